"""NBDiff: block diffusion that grew out of an autoregressive model, and still is one.

"From Next-Token to Next-Block" (2512.06776). Finished text is causal, token by token, so that the cache is that of an
autoregressive model; only the open block sees all of itself. `hasten train nbdiff` adapts a model, growing blocks from
one token on. `nbdiff` decodes as the paper does: parts of a block from left to right, every token above `threshold`
(rule `confidence`), or one per pass (`entropy`, `margin`); a pass with the causal mask then brings the block into the
cache and gives the first token of the next one. Exactness: lossy against the model's own autoregressive decoding.

`nbdiff-draft` makes that lossless, which the paper does not: the same weights denoise a block behind the last token as
a draft, and verify it autoregressively. A draft costs `passes` passes of a block's rows, a verification one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.engine import Draft, Drafter, Knob, Request, Target, View, register
from hasten.engine.sampling.sampler import likeliest_of_model
from hasten.errors import require
from hasten.methods.diffusion.block_denoiser import BlockDenoiser, BlockParameters
from hasten.methods.diffusion.causal_context import require_causal_context
from hasten.methods.diffusion.denoise import scores
from hasten.model import Rows, Span

RULES = ("confidence", "entropy", "margin")


@dataclass(frozen=True)
class NBDiffParameters(BlockParameters):
    """`rule` says which masked tokens are committed; `threshold` is that of `confidence`, strictly above.

    Raises:
        UserError: out of range.
    """

    rule: str = "confidence"
    threshold: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = (
            (self.rule in RULES, f"rule must be one of {', '.join(RULES)}, not {self.rule!r}"),
            (self.threshold >= 0, "threshold must not be negative"),
        )
        require(checks, "nbdiff")


@register(
    "nbdiff",
    role="denoiser",
    family="diffusion",
    exactness="lossy",
    paper="2512.06776",
    title="NBDiff: blocks denoised behind a causal context",
    parameters=NBDiffParameters,
    needs_training=True,
    knob=Knob("threshold", (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)),
)
class NBDiff(BlockDenoiser[NBDiffParameters]):
    """Commits the surest position of a block after each look, and with the confidence rule all above the threshold.

    Raises:
        UserError: the model has no causal context with shifted predictions.
    """

    def __init__(self, target: Target, parameters: NBDiffParameters) -> None:
        require_causal_context(target, "nbdiff", "shifted")
        super().__init__(target, parameters)

    def update(self, request: Request, view: View) -> None:
        chosen = view.best(scores(self.parameters.rule, view))
        if self.parameters.rule == "confidence":
            chosen |= view.open & (view.confidence > self.parameters.threshold)
        view.commit(chosen)


@dataclass(frozen=True)
class NBDiffDraftParameters:
    """`passes` over the block at most, each committing what is above `threshold`; the draft ends before a token that
    has less than `confidence`.

    Raises:
        UserError: out of range.
    """

    passes: int = 1
    threshold: float = 0.9
    confidence: float = 0.3

    def __post_init__(self) -> None:
        checks = (
            (self.passes >= 1, "passes must be at least 1"),
            (self.threshold >= 0 and self.confidence >= 0, "threshold and confidence must not be negative"),
        )
        require(checks, "nbdiff-draft")


@register(
    "nbdiff-draft",
    command="hasten bench --model tiny-block --methods nbdiff-draft",
    family="drafters",
    exactness="lossless",
    paper="2512.06776",
    title="NBDiff's blocks as drafts, verified by the same weights",
    parameters=NBDiffDraftParameters,
    needs_training=True,
)
class NBDiffDraft(Drafter):
    """Stateless; drafts are the likeliest tokens, which verification matches whatever the temperature."""

    def __init__(self, target: Target, parameters: NBDiffDraftParameters) -> None:
        diffusion = require_causal_context(target, "nbdiff-draft", "shifted")
        self.model, self.parameters = target.model, parameters
        self.mask_id, self.block = diffusion.mask_id, diffusion.block or 1

    def propose(self, request: Request, budget: int) -> Draft:
        return self.propose_all([request], [budget])[0]

    def propose_all(self, requests: Sequence[Request], budgets: Sequence[int]) -> list[Draft]:
        sizes = [
            max(0, min(self.block - 1, budget, request.stopper.left - 1))
            for request, budget in zip(requests, budgets, strict=True)
        ]
        guesses = [_Guess(torch.full((size,), self.mask_id), torch.zeros(size), 0) for size in sizes]
        for _ in range(self.parameters.passes):
            waiting = [number for number, guess in enumerate(guesses) if guess.decided < len(guess.tokens)]
            if waiting:
                self._look([requests[number] for number in waiting], [guesses[number] for number in waiting])
        drafts = []
        for guess in guesses:
            unsure = (guess.confidence < self.parameters.confidence).nonzero()
            count = int(unsure[0]) if len(unsure) else len(guess.tokens)
            drafts.append(Draft.chain(guess.tokens[:count].tolist(), guess.confidence[:count].cumprod(0).tolist()))
        return drafts

    def _look(self, requests: Sequence[Request], guesses: Sequence[_Guess]) -> None:
        """One pass over the open blocks: the last token's row and the masks behind it see each other and the cache."""
        tokens: list[int] = []
        positions: list[int] = []
        spans = []
        for request, guess in zip(requests, guesses, strict=True):
            first, last = len(tokens), len(request.tokens) - 1
            known = torch.where(guess.confidence > self.parameters.threshold, guess.tokens, self.mask_id)
            tokens += [request.tokens[-1], *known.tolist()]
            positions += range(last, last + 1 + len(guess.tokens))
            spans.append(Span(request.sequence, first, len(tokens), "all"))
        device = self.model.device
        rows = Rows(torch.tensor(tokens, device=device), torch.tensor(positions, device=device), spans)
        wanted = [row for span in spans for row in range(span.start, span.stop - 1)]
        logits = self.model.forward(rows, wanted)
        likeliest_of_model(logits)
        logits[:, self.mask_id] = -torch.inf
        confidence, likeliest = (part.cpu() for part in logits.softmax(-1).max(-1))
        start = 0
        for guess in guesses:
            stop = start + len(guess.tokens)
            fresh = guess.confidence <= self.parameters.threshold
            guess.tokens = torch.where(fresh, likeliest[start:stop], guess.tokens)
            guess.confidence = torch.where(fresh, confidence[start:stop], guess.confidence)
            guess.decided = int((guess.confidence > self.parameters.threshold).sum())
            start = stop


@dataclass
class _Guess:
    """A block behind the last token: its likeliest tokens, their probabilities, and how many are above the
    threshold."""

    tokens: Tensor
    confidence: Tensor
    decided: int
