"""S2D: a drafter whose first layers are drafters, too; each token leaves at the first of them that is sure of it.

"S2D: Sorted Speculative Decoding For More Efficient Deployment of Nested Large Language Models", 2024, arXiv
2407.01955. Exactness: lossless. Whether a drafter is sure depends on the context alone, never on a token that was
drawn, and q is the distribution of the exit that was used. (The authors' program drafts the likeliest token and hands
over the whole distribution as its q, which is not exact.)

Layers behind an exit read the rows that left there when a later token goes further, in one pass with it. What was
committed is read by all layers, in the pass that begins the draft: the paper has this for the prompt alone, but a
pass over few rows costs as much as over one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar, cast

import torch
from torch import Tensor

from hasten.engine import Request, Target, register
from hasten.engine.memory import LOGIT_BYTES
from hasten.errors import UserError
from hasten.methods.drafters.draft_model import DraftModel, DraftModelParameters
from hasten.methods.drafters.segments import Lot, SegmentedCache, SegmentedSequence, cut, read
from hasten.methods.drafters.sequences import Sequences
from hasten.methods.drafters.small_model import beside, is_whole
from hasten.model import Decoder, Model, Rows, Span

EXITS, THRESHOLDS = "exits", "thresholds"
"""In a drafter's config.json: numbers of layers, ascending, and what each exit but the last is sure from."""
SURE = 0.5
"""The threshold of an exit without one of its own, as the authors' program has it."""


@dataclass(frozen=True)
class S2DParameters(DraftModelParameters):
    """Parameters of `draft-model`, always a chain, and of the exits.

    Attributes:
        model: folder or hub id; `auto` is the folder beside the target that is named like it with `-s2d`, or `-draft`.
        exits: numbers of layers behind which a token may leave, as `2/4/6`; the last has all layers. `auto` takes what
            the drafter's configuration says, else thirds.
        threshold: a token leaves where the likeliest one has more probability; 0 takes the drafter's own thresholds.

    Raises:
        UserError: out of range.
    """

    slug: ClassVar[str] = "s2d"

    exits: str = "auto"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width != 1:
            raise UserError("s2d: width must be 1: it drafts chains")
        if not 0 <= self.threshold <= 1:
            raise UserError("s2d: threshold must be between 0 and 1; 0 takes the drafter's own")
        if self.exits != "auto":
            read_exits(self.exits)


def read_exits(text: str) -> tuple[int, ...]:
    """Numbers of layers with `/` between.

    Raises:
        UserError: no ascending positive numbers, or fewer than two.
    """
    try:
        exits = tuple(int(each) for each in text.split("/"))
    except ValueError:
        exits = ()
    if len(exits) < 2 or exits[0] < 1 or list(exits) != sorted(set(exits)):
        raise UserError(f"exits must be ascending numbers of layers with / between, such as 2/4/6, not {text!r}")
    return exits


@register(
    "s2d",
    family="drafters",
    exactness="lossless",
    paper="2407.01955",
    title="S2D: a small model that tokens leave where it is sure",
    parameters=S2DParameters,
)
class S2D(DraftModel):
    """`draft-model` whose chains run through as many layers as each token needs.

    Attributes:
        exits: numbers of layers behind which a token may leave.
        thresholds: of all of them but the last.
        left: of drafted tokens but the first of each draft, how many left at each exit.
    """

    plain_tokens: ClassVar[bool] = False

    def __init__(self, target: Target, parameters: S2DParameters) -> None:
        super().__init__(target, parameters)
        if not isinstance(self.model, Decoder):
            raise UserError("s2d needs a small model with layers")
        self.exits = self._exits(self.model, parameters)
        self.thresholds = self._thresholds(self.model, parameters)
        try:
            self.segments = cut(self.model, self.exits)
        except ValueError as error:
            raise UserError(f"s2d cannot cut this drafter: {error}") from error
        self.cache = SegmentedCache(self.model, self.segments)
        self._sequences = Sequences(self.cache, self.length)
        self.left = [0] * len(self.exits)

    def _load(self, target: Target, parameters: DraftModelParameters) -> Model:
        own = beside(target, parameters.slug) if parameters.model == "auto" else None
        return super()._load(target, replace(parameters, model=own) if own and is_whole(own) else parameters)

    @staticmethod
    def _exits(model: Decoder, parameters: S2DParameters) -> tuple[int, ...]:
        depth, told = len(model.layers), model.config.source.get(EXITS)
        if parameters.exits != "auto":
            exits = read_exits(parameters.exits)
        elif told is not None:
            exits = read_exits("/".join(map(str, told)) if isinstance(told, list) else str(told))
        else:
            exits = tuple(sorted({max(1, depth // 3), max(1, 2 * depth // 3), depth}))
        if exits[-1] != depth:
            raise UserError(f"s2d: the drafter has {depth} layers, so the last exit must be {depth}, not {exits[-1]}")
        return exits

    def _thresholds(self, model: Decoder, parameters: S2DParameters) -> list[float]:
        count, told = len(self.exits) - 1, model.config.source.get(THRESHOLDS)
        if parameters.threshold:
            return [parameters.threshold] * count
        if parameters.exits != "auto" or told is None:
            return [SURE] * count
        sound = isinstance(told, list) and all(isinstance(each, int | float) and 0 <= each <= 1 for each in told)
        if not sound or len(told) != count:
            raise UserError(f"s2d: the drafter's {THRESHOLDS} must be {count} numbers between 0 and 1")
        return [float(each) for each in told]

    def _forward(
        self, tokens: list[int], positions: list[int], spans: list[Span], wanted: Sequence[int], drafted: bool = False
    ) -> Tensor:
        """All layers for what was committed; for the row of a growing draft as many as it takes to be sure."""
        device = self.model.device
        places = torch.tensor(positions, device=device)
        states = cast(Decoder, self.model).embed(Rows(torch.tensor(tokens, device=device), places, spans))
        sequences = [cast(SegmentedSequence, span.sequence) for span in spans]
        lots = [Lot(states[span.start : span.stop], places[span.start : span.stop]) for span in spans]
        if drafted:
            return self._until_sure(sequences, lots)
        last = len(self.segments) - 1
        for number in range(last):
            _, lots = read(self.segments, number, sequences, lots, False, ())
        return read(self.segments, last, sequences, lots, False, wanted)[0]

    def _until_sure(self, sequences: list[SegmentedSequence], lots: list[Lot]) -> Tensor:
        """Logits of the last row of each lot, from the exit where it left."""
        found: dict[int, Tensor] = {}
        active = list(range(len(sequences)))
        for number, threshold in enumerate((*self.thresholds, -1.0)):
            ends = [stop - 1 for stop in accumulate(map(len, lots))]
            logits, given = read(self.segments, number, [sequences[each] for each in active], lots, True, ends)
            sure = (self._confidence(logits) > threshold).tolist()
            further: list[tuple[int, Lot]] = []
            for place, (each, lot) in enumerate(zip(active, given, strict=True)):
                waiting = sequences[each].waiting
                rows = lot.behind(waiting[number]) if number < len(waiting) else lot
                if sure[place]:
                    found[each] = logits[place]
                    self.left[number] += 1
                if number < len(waiting):
                    waiting[number] = rows if sure[place] else None
                if not sure[place]:
                    further.append((each, rows))
            if not further:
                break
            active, lots = [each for each, _ in further], [lot for _, lot in further]
        return torch.stack([found[each] for each in range(len(sequences))])

    def _confidence(self, logits: Tensor) -> Tensor:
        """[rows]: the probability of the likeliest token that may be drafted."""
        words = logits if self.words is None else logits[:, : len(self.words)]
        return (words.amax(-1) - words.logsumexp(-1)).exp()

    def _pass_bytes(self, requests: Sequence[Request], nodes: int) -> int:
        """With what segments hand on, what waits, and the logits that rows leave with."""
        rows = max(self._unread(requests), len(requests) * nodes)
        handed = rows * self.model.config.hidden_size * LOGIT_BYTES * (2 + len(self.exits))
        leaving = 3 * len(requests) * self.vocabulary * LOGIT_BYTES
        return super()._pass_bytes(requests, nodes) + handed + leaving
