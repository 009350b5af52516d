"""The interface of an approximation: a method that computes its requests' rows by itself, for less than the model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from hasten.engine.drafting.draft import Draft
from hasten.engine.drafting.drafter import Drafter
from hasten.engine.request import Request
from hasten.model import Rows


class Approximation(Drafter):
    """Decodes token by token, as plain decoding does, by passes of its own: lossy.

    Prompts are read by the model itself, in its own passes. Every row behind is computed by `forward`, one of a request
    at a time, those that a preemption has read again, too: so what is made of a row may follow from how many stand
    before it, and a request's tokens never depend on its neighbours as long as a row's result does not.
    """

    alone = True

    @abstractmethod
    def forward(self, requests: Sequence[Request], rows: Rows, wanted: Sequence[int]) -> Tensor:
        """Float32 logits [wanted rows, vocabulary], with keys and values left pending, as `hasten.model.Model.forward`.

        Args:
            requests: one for each of the rows, at position `request.read`.
            rows: each a span of its own.
        """

    def propose(self, request: Request, budget: int) -> Draft:
        """Nothing: what it computes is not verified."""
        return Draft()
