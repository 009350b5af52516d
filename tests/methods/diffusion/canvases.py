"""What tests of denoisers share: laws over canvases, a naive reference, and how to decode."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.engine import Canvas, Engine, Request, SamplingParams, View
from hasten.engine.canvas.filling import Filling
from hasten.engine.sampling.sampler import Sampler
from hasten.model import CanvasOracle, DiffusionConfig, Model, Rows
from hasten.tasks.parallelbench.operations import ListProblem
from hasten.tasks.parallelbench.oracle import list_oracle

MASK, VOCABULARY, BLOCK = 11, 12, 4
FULL = {
    f"full-{alignment}": DiffusionConfig("full", alignment, MASK)  # type: ignore[arg-type]
    for alignment in ("same", "shifted")
}
BLOCKS = {
    f"{attention}-{alignment}": DiffusionConfig(attention, alignment, MASK, BLOCK)  # type: ignore[arg-type]
    for attention in ("block-causal", "context-causal")
    for alignment in ("same", "shifted")
}
CONFIGS = FULL | BLOCKS
PROMPTS = [[7], [3, 1, 4], [1, 5, 9, 2], [6, 5, 3, 5, 8], [9, 7, 9, 3, 2, 3, 8, 4]]
"""Of one token, of one less than a block, a block, one more, and two blocks."""
_WEIGHTS = 2 * torch.randn(64, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))

Logits = Callable[[Tensor, Tensor], Tensor]
"""Token ids [rows] and what each row sees, bool [rows, rows], to logits [rows, vocabulary]."""


def everything_counts(seen: Sequence[tuple[int, int]], position: int) -> Tensor:
    """A law that depends on every visible token, masks too, and on where it stands."""
    places, tokens = torch.tensor(seen).T
    far = (1.0 + (places - position).abs()) ** -0.7
    return (_WEIGHTS[(position - places) % 64, tokens] * far[:, None]).sum(0)


class Watched(CanvasOracle):
    """Keeps the tokens and positions of each pass, per request."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.passes: list[list[tuple[list[int], list[int]]]] = []

    def forward(self, rows: Rows, wanted: Sequence[int] | None = None, taps: Any = None) -> Tensor:
        self.passes.append(
            [
                (rows.tokens[span.start : span.stop].tolist(), rows.positions[span.start : span.stop].tolist())
                for span in rows.spans
            ]
        )
        return super().forward(rows, wanted, taps)

    def rows(self) -> list[int]:
        """Rows of each pass so far."""
        return [sum(len(tokens) for tokens, _ in spans) for spans in self.passes]


def oracle(name: str, law: Any = everything_counts, vocabulary: int = VOCABULARY) -> Watched:
    return Watched(law, vocabulary, CONFIGS[name])


def by_position(tokens: dict[int, int], sureness: dict[int, float]) -> Any:
    """A law that says the same whatever it sees: a token per position, and by how many nats it leads."""

    def law(seen: Sequence[tuple[int, int]], position: int) -> Tensor:
        logits = torch.zeros(VOCABULARY)
        logits[tokens.get(position, 0)] = sureness.get(position, 1.0)
        return logits

    return law


def list_model(problem: ListProblem[int]) -> tuple[CanvasOracle, list[int]]:
    """The ideal denoiser of a list operation as a model that sees everything, and its prompt.

    The answer stands behind the prompt; token ids are the items, the last one of the vocabulary is the mask.
    """
    vocabulary = max((*problem.items, problem.word or 0)) + 2
    answers = list_oracle(problem, vocabulary)

    @cache
    def marginals(ids: tuple[int, ...]) -> Tensor:
        canvas = np.array(ids)
        return torch.tensor(np.log(np.maximum(answers.marginals(canvas, canvas == vocabulary - 1), 1e-30)))

    def law(seen: Sequence[tuple[int, int]], position: int) -> Tensor:
        return marginals(tuple(token for _, token in seen[1:]))[position - 1]

    return CanvasOracle(law, vocabulary, DiffusionConfig("full", "same", vocabulary - 1)), [0]


def run(engine: Engine, *jobs: tuple[list[int], SamplingParams, Any]) -> list[Request]:
    """Decode (prompt, parameters, method) together; the first choice of each."""
    requests = [engine.add(*job)[0] for job in jobs]
    for _ in engine.run():
        pass
    assert engine.cache.used_bytes == 0
    return requests


def decode(model: Model, method: Any, prompt: list[int], end_ids: Collection[int] = (), **params: Any) -> Request:
    """Decode one prompt alone."""
    return run(Engine(model, end_ids=end_ids), (prompt, SamplingParams(**params), method))[0]


def canvas_of(request: Request) -> Canvas:
    assert isinstance(request.decoding, Filling)
    return request.decoding.canvas


def by_law(name: str, law: Any = everything_counts) -> Logits:
    """A law's logits, without cache and engine."""
    shift = CONFIGS[name].alignment == "shifted"

    def logits(ids: Tensor, sees: Tensor) -> Tensor:
        tokens = ids.tolist()
        return torch.stack(
            [
                law([(place, tokens[place]) for place in row.nonzero().flatten().tolist()], number + shift)
                for number, row in enumerate(sees)
            ]
        ).double()

    return logits


def visible(config: DiffusionConfig, length: int, start: int) -> Tensor:
    """What each of `length` rows sees, bool [rows, rows], while the block from `start` on is open."""
    rows = torch.arange(length)
    if config.attention == "full":
        return torch.ones(length, length, dtype=torch.bool)
    if config.attention == "block-causal":
        assert config.block is not None
        return rows[:, None] // config.block >= rows[None, :] // config.block
    return (rows[:, None] >= rows[None, :]) | (rows[:, None] >= start)


def reference(
    config: DiffusionConfig, logits: Logits, prompt: list[int], tokens: int, block: int = BLOCK, per_step: int = 1
) -> tuple[list[int], int, list[Tensor]]:
    """One token per pass, the surest of the open block, everything computed anew each time, by the definition.

    Returns:
        The new tokens, the passes that gave some, and what each said of the open block: [positions, vocabulary].
    """
    shift = 1 if config.alignment == "shifted" else 0
    start = len(prompt) // block * block if config.attention == "block-causal" else len(prompt)
    whole = config.attention != "full"
    end = len(prompt) + tokens
    length = start + -(-(end - start) // block) * block if whole else end
    ids = torch.tensor(prompt + [config.mask_id] * (length - len(prompt)))
    masked = torch.arange(length) >= len(prompt)
    passes, said = 0, []

    def look(low: int, stop: int, until: int, open_from: int) -> Tensor:
        """Of the positions `low` to `stop`, while the first `until` positions exist."""
        table = logits(ids[:until], visible(config, until, open_from)).clone()
        table[:, config.mask_id] = -torch.inf
        return table[low - shift : stop - shift]

    while start < length:
        stop = min(start + block, length)
        low = start
        if whole and shift:
            if masked[start]:
                # The pass over finished text predicts it: no mask is seen.
                ids[start], masked[start] = look(start, start + 1, start, start)[0].argmax(), False
                passes += 1
            low = start + 1
        while masked[low:stop].any():
            table = look(low, stop, stop if whole else length, start)
            passes += 1
            said.append(table)
            sure = table.softmax(-1).max(-1).values.masked_fill(~masked[low:stop], -1.0)
            for place in torch.sort(sure, descending=True, stable=True).indices[:per_step].tolist():
                if masked[low + place]:
                    ids[low + place], masked[low + place] = table[place].argmax(), False
        start = stop
    return ids[len(prompt) : end].tolist(), passes, said


def view_of(
    confidence: Sequence[float], masked: Sequence[bool] | None = None, active: int | None = None, start: int = 1
) -> View:
    """A view of a canvas, masked unless told otherwise, whose rows predict token 1 with these probabilities."""
    count = len(confidence)
    canvas = Canvas([5] * start, start + count, MASK, Sampler(SamplingParams(seed=0), 0, [5], VOCABULARY))
    if masked is not None:
        decided = start + (~torch.tensor(masked)).nonzero().flatten()
        canvas.commit(decided, torch.full_like(decided, 2))
    canvas.steps = 1
    sure = torch.tensor(confidence, dtype=torch.float64)
    logits = ((1 - sure) / (VOCABULARY - 2)).clamp(min=1e-30)[:, None].repeat(1, VOCABULARY)
    logits[:, 1], logits[:, MASK] = sure, 0.0
    return View(canvas, start, logits.log().float(), count if active is None else active)


def committed(view: View) -> set[int]:
    """The rows of a view that its canvas has committed since."""
    rows = slice(view.start, view.start + len(view.masked))
    return set((view.masked & ~view.canvas.masked[rows]).nonzero().flatten().tolist())
