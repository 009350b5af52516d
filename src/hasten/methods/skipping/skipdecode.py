"""SkipDecode: the later a token, the fewer layers compute it; the lowest and the upper ones stay.

"SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference", 2023, arXiv
2307.02628. Early exit breaks batches, whose rows leave at different layers, and caches, where a later row needs keys
that an earlier one never made. Here the number of layers follows from a token's place in the answer alone, and only
falls: linearly, from `most` for the first to `least` for the last. The lowest `warm` layers are always run, then the
row jumps to as many of the upper ones as its number allows. So a layer that a row runs was run for all rows before it:
its keys have no gaps, and where it is skipped its slots stay unwritten and unread. Prompts go through all layers.

Exactness: lossy. Nothing is verified. The model should have been trained with its schedule (`hasten train skipdecode`),
which its configuration then names: others lose their way where the jump is long, so by default nothing is skipped there
(`share=1`). `docs/skipping.md` has figures.

Decisions where the paper leaves room:

- *Numbers of layers.* The paper's exit points are taken as how many layers are run, the lowest ones included: that
  gives the mean of its own speed-up targets. `share` is that mean; first and last number lie a third of it apart from
  it, as those of the paper's targets do, or as far as there are layers.
- *How long an answer is.* The schedule ends at `length` tokens, by default at the request's own limit. Shorter answers
  do not come to its end.
- *Batches.* Requests of one number of layers share a pass; any may join a batch at any time. Those that are apart in
  their answers read the weights that they share once each.
- A row that is read again after a preemption is computed as it was before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.engine import Approximation, Knob, Request, Target, register
from hasten.engine.memory import logits_bytes
from hasten.errors import UserError, require
from hasten.methods.skipping.layers import require_layers
from hasten.model import Decoder, Rows, Span

TRAINED = {"share": float, "warm": int, "length": int}
"""Parameters that a model is trained with, which its configuration names."""


@dataclass(frozen=True)
class Schedule:
    """How many layers compute each token of an answer, and which.

    Attributes:
        layers: of the model.
        warm: the lowest, which are always run.
        most, least: how many are run for the first token and for the last.
    """

    layers: int
    warm: int
    most: int
    least: int

    def count(self, index: int, length: int) -> int:
        """Layers that are run for the token of this number, from 0 on, of an answer of so many tokens."""
        place = min(index / max(1, length - 1), 1.0)
        return round((1 - place) * self.most + place * self.least)

    def chosen(self, count: int) -> tuple[int, ...]:
        """The numbers of so many layers: the lowest, and the upper ones."""
        return (*range(self.warm), *range(self.layers - (count - self.warm), self.layers))


@dataclass(frozen=True)
class SkipDecodeParameters:
    """Parameters of the schedule.

    Attributes:
        share: of the layers, that are run in the mean of an answer of full length.
        most, least: how many are run for the first token and for the last; 0 follows from `share`.
        warm: lowest layers, which are always run.
        length: tokens of an answer at which the least is reached; 0: as many as the request may have.

    Raises:
        UserError: out of range.
    """

    share: float = 1.0
    most: int = 0
    least: int = 0
    warm: int = 1
    length: int = 0

    def __post_init__(self) -> None:
        checks = (
            (0 < self.share <= 1, "share must be above 0 and at most 1"),
            (min(self.most, self.least, self.length) >= 0, "most, least and length must not be negative"),
            (not self.most or not self.least or self.most >= self.least, "most must not be below least"),
            (self.warm >= 1, "warm must be at least 1"),
        )
        require(checks, "skipdecode")

    def schedule(self, layers: int) -> Schedule:
        """Of a model of so many layers.

        Raises:
            UserError: it has fewer than are to be run.
        """
        mean = self.share * layers
        spread = min(mean / 3, layers - mean)
        lowest = min(self.warm + 1, layers)
        most = self.most or max(lowest, round(mean + spread))
        least = self.least or min(most, max(lowest, round(mean - spread)))
        if not self.warm < least <= most <= layers:
            raise UserError(
                f"skipdecode: {least} to {most} layers cannot be run, {self.warm} of them the lowest, "
                f"since the model has {layers}"
            )
        return Schedule(layers, self.warm, most, least)


def own_schedule(target: Target) -> dict[str, Any]:
    """What a model was trained with: `skipdecode` in its configuration.

    Raises:
        UserError: that is damaged.
    """
    own = target.model.config.source.get("skipdecode", {})
    try:
        return {name: kind(own[name]) for name, kind in TRAINED.items() if name in own}
    except (TypeError, ValueError) as error:
        raise UserError(f"skipdecode: the model's configuration says {own!r}, which is no schedule") from error


@register(
    "skipdecode",
    family="skipping",
    exactness="lossy",
    paper="2307.02628",
    title="SkipDecode: the later a token, the fewer layers",
    parameters=SkipDecodeParameters,
    knob=Knob("share", (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)),
    defaults=own_schedule,
    command="hasten sweep --model tiny --methods skipdecode --suite tasks --per-task 4 --temperature 0",
)
class SkipDecode(Approximation):
    """Runs a part of the model per number of layers.

    Raises:
        UserError: a model that is not made of attention layers only, or has fewer than are to be run.

    Attributes:
        computed: layers that rows went through so far; `rows` of them.
    """

    def __init__(self, target: Target, parameters: SkipDecodeParameters) -> None:
        self.model, self.parameters = require_layers(target, "skipdecode"), parameters
        self.schedule = parameters.schedule(len(self.model.layers))
        self._parts: dict[int, Decoder] = {self.schedule.layers: self.model}
        self.computed = self.rows = 0

    def scratch_bytes(self, requests: Sequence[Request], nodes: int) -> int:
        # The logits of the parts, until they are put together.
        return logits_bytes(len(requests), self.model.config.vocab_size)

    def forward(self, requests: Sequence[Request], rows: Rows, wanted: Sequence[int]) -> Tensor:
        groups: dict[int, list[int]] = {}
        for row, request in enumerate(requests):
            groups.setdefault(self.count(request), []).append(row)
        self.rows += len(requests)
        self.computed += sum(count * len(group) for count, group in groups.items())
        if len(groups) == 1:
            return self._part(next(iter(groups))).forward(rows, wanted)
        logits = torch.empty(len(wanted), self.model.config.vocab_size, device=self.model.device)
        places = {row: place for place, row in enumerate(wanted)}
        for count, group in groups.items():
            spans = [Span(rows.spans[row].sequence, place, place + 1) for place, row in enumerate(group)]
            own = Rows(rows.tokens[group], rows.positions[group], spans)
            heard = [place for place, row in enumerate(group) if row in places]
            logits[[places[group[place]] for place in heard]] = self._part(count).forward(own, heard)
        return logits

    def count(self, request: Request) -> int:
        """Layers that the next row of a request goes through."""
        length = self.parameters.length or len(request.output) + request.stopper.left
        return self.schedule.count(request.read - request.prompt_length, length)

    def _part(self, count: int) -> Decoder:
        if count not in self._parts:
            self._parts[count] = self.model.part(self.schedule.chosen(count))
        return self._parts[count]
