"""What a forward pass says of some positions of a canvas."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hasten.engine.canvas.canvas import Canvas


@dataclass(frozen=True)
class Hypothesis:
    """Contents that the block from position `start` on might have: int64 ids and bool masked, [block] each.

    `path` are the tokens that it has more than the canvas.
    """

    start: int
    ids: Tensor
    masked: Tensor
    path: tuple[int, ...]

    def same(self, other: Hypothesis) -> bool:
        """Whether all tokens and all masks are the same."""
        return torch.equal(self.ids, other.ids) and torch.equal(self.masked, other.masked)


class View:
    """Predictions for the positions `start` onwards, one row each, already aligned.

    Args:
        canvas: as it was when the pass was made.
        start: position of the first row.
        logits: float32 [rows, vocabulary], the mask's own -inf.
        active: the first `active` rows belong to the block (or part of one) that is being filled.
        hypothesis: what the view is of, if not of the canvas.
    """

    def __init__(
        self,
        canvas: Canvas,
        start: int,
        logits: Tensor,
        active: int,
        hypothesis: Hypothesis | None = None,
    ) -> None:
        rows = logits.shape[0]
        self.canvas, self.start, self.active = canvas, start, active
        self.path = () if hypothesis is None else hypothesis.path
        self.logits = logits.cpu()
        if hypothesis is None:
            self.masked = canvas.masked[start : start + rows].clone()
        else:
            first = start - hypothesis.start
            self.masked = hypothesis.masked[first : first + rows]

    @cached_property
    def tokens(self) -> Tensor:
        """int64 [rows]: what each position would become, the likeliest token or the keyed draw.

        The noise belongs to the position, not to the step: a prediction gives the same token whenever it is made.
        """
        rows = self.logits.shape[0]
        positions = list(range(self.start, self.start + rows))
        chosen = self.canvas.sampler.choose(self.logits, positions, [self.path] * rows)
        return torch.tensor(chosen, dtype=torch.int64)

    @cached_property
    def log_probabilities(self) -> Tensor:
        """float64 [rows, vocabulary], the model's own: before temperature, penalties and filters."""
        return self.logits.double().log_softmax(-1)

    @cached_property
    def confidence(self) -> Tensor:
        """float64 [rows]: the model's own probability of `tokens`, so that thresholds do not depend on temperature."""
        return self.log_probabilities.gather(1, self.tokens.unsqueeze(1)).squeeze(1).exp()

    @cached_property
    def margin(self) -> Tensor:
        """float64 [rows]: how much likelier the first token is than the second."""
        top = self.log_probabilities.exp().topk(2, -1).values
        return top[:, 0] - top[:, 1]

    @cached_property
    def entropy(self) -> Tensor:
        """float64 [rows], in nats."""
        logs = self.log_probabilities
        return -torch.where(logs > -torch.inf, logs.exp() * logs, 0.0).sum(-1)

    @cached_property
    def gaps(self) -> Tensor:
        """float32 [rows]: the largest logit less the second."""
        top = self.logits.topk(2, -1).values
        return top[:, 0] - top[:, 1]

    @cached_property
    def ends(self) -> Tensor:
        """bool [rows]: whether the text would end here."""
        return torch.isin(self.tokens, self.canvas.end_ids)

    @cached_property
    def open(self) -> Tensor:
        """bool [rows]: masked rows of the active part, the only ones a policy may commit."""
        inside = torch.arange(self.logits.shape[0]) < self.active
        return self.masked & inside

    def decided(self) -> View:
        """This view, its tokens chosen now: once the hypothesis is committed, penalties would count them twice."""
        _ = self.tokens
        return self

    def ranking(self, scores: Tensor) -> Tensor:
        """int64 [open rows]: the open rows, those of highest score first; of equal ones the first."""
        ranked = torch.sort(scores.masked_fill(~self.open, -torch.inf), descending=True, stable=True).indices
        return ranked[self.open[ranked]]

    def best(self, scores: Tensor, count: int = 1) -> Tensor:
        """bool [rows]: the `count` open rows of highest score."""
        chosen = torch.zeros_like(self.open)
        chosen[self.ranking(scores)[:count]] = True
        return chosen

    def commit(self, chosen: Tensor) -> None:
        """Put the tokens of the chosen rows (bool [rows]) into the canvas."""
        rows = chosen.nonzero().squeeze(1)
        self.canvas.commit(self.start + rows, self.tokens[rows])
