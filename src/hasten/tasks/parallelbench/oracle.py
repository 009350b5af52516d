"""The ideal denoiser of the list operations: exact marginals of the masked positions, by counting answers.

It stands where a network stands: all valid answers are equally likely, and each masked position gets its
distribution given what is committed, as if no other masked position were filled at the same time. Decoded one
position at a time it is always right; what it loses beyond that is the loss of decoding in parallel, no model's.

Canvases are arrays over the positions of the answer, with any number of leading axes: `ids` of integers and
`masked` of booleans (ids at masked positions do not matter). Where nothing agrees with the committed tokens any
more, as after a wrong step, the marginals are those of the empty canvas.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hasten.errors import UserError

from .operations import ListProblem

T = TypeVar("T")
Ids = NDArray[np.integer[Any]]
Booleans = NDArray[np.bool_]
Floats = NDArray[np.float64]


class Oracle(ABC):
    """The exact conditional marginals over `length` positions and `vocabulary` token ids."""

    def __init__(self, length: int, tokens: Ids, vocabulary: int) -> None:
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise UserError(f"The token ids of a list must be from 0 to {vocabulary - 1}.")
        self.length, self.vocabulary = length, vocabulary

    @abstractmethod
    def consistent(self, ids: Ids, masked: Booleans) -> Booleans:
        """Whether some valid answer has all committed tokens: bool [...] of canvases [..., length]. For a canvas
        without masks: whether it is a valid answer."""

    @abstractmethod
    def _marginals(self, ids: Ids, masked: Booleans) -> tuple[Floats, Ids]:
        """What is right at masked positions: float64 [..., length, symbols], and the token ids of the symbols."""

    def marginals(self, ids: Ids, masked: Booleans) -> Floats:
        """Probabilities, float64 [..., length, vocabulary]. A committed position has its own token for certain.

        Raises:
            UserError: the canvas has another length than the answer.
        """
        if ids.shape != masked.shape or ids.shape[-1] != self.length:
            raise UserError(f"The canvas must have {self.length} positions, in ids and masks alike.")
        probabilities, symbols = self._marginals(ids, masked)
        full = np.zeros((*ids.shape, self.vocabulary))
        full[..., symbols] = np.where(masked[..., None], probabilities, 0.0)
        committed = np.nonzero(~masked)
        full[(*committed, ids[committed])] = 1.0
        return full


class CountingOracle(Oracle):
    """For any set of answers: counts those that agree. `answers` are token ids [answers, length], each row once."""

    def __init__(self, answers: Sequence[Sequence[int]], vocabulary: int) -> None:
        self.answers = np.array(answers, dtype=np.int64)
        super().__init__(self.answers.shape[1], self.answers, vocabulary)
        self.symbols = np.unique(self.answers)
        self.one_hot = (self.answers[:, :, None] == self.symbols).astype(np.float64)

    def agreeing(self, ids: Ids, masked: Booleans) -> Booleans:
        """Which answers have all committed tokens: bool [..., answers]."""
        agree: Booleans = ((ids[..., None, :] == self.answers) | masked[..., None, :]).all(-1)
        return agree

    def consistent(self, ids: Ids, masked: Booleans) -> Booleans:
        return np.asarray(self.agreeing(ids, masked).any(-1))

    def _marginals(self, ids: Ids, masked: Booleans) -> tuple[Floats, Ids]:
        weights = self.agreeing(ids, masked)
        weights = weights | ~weights.any(-1, keepdims=True)
        counts = np.tensordot(weights.astype(np.float64), self.one_hot, axes=1)
        return counts / weights.sum(-1)[..., None, None], self.symbols


class ShuffleOracle(Oracle):
    """For all orders of a list: every masked position is uniform over the items left, without counting n! orders."""

    def __init__(self, items: Sequence[int], vocabulary: int) -> None:
        self.items = np.array(items, dtype=np.int64)
        super().__init__(len(items), self.items, vocabulary)

    def left(self, ids: Ids, masked: Booleans) -> Booleans:
        """Which items are not committed anywhere: bool [..., items]."""
        used = (ids[..., :, None] == self.items) & ~masked[..., None]
        return np.asarray(~used.any(-2))

    def consistent(self, ids: Ids, masked: Booleans) -> Booleans:
        # As many items are left as there are places for them: no committed token is foreign or a repetition.
        return np.asarray(self.left(ids, masked).sum(-1) == masked.sum(-1))

    def _marginals(self, ids: Ids, masked: Booleans) -> tuple[Floats, Ids]:
        left = self.left(ids, masked) | ~self.consistent(ids, masked)[..., None]
        row = left / np.maximum(left.sum(-1, keepdims=True), 1)
        return np.broadcast_to(row[..., None, :], (*ids.shape, len(self.items))), self.items


def list_oracle(problem: ListProblem[Any], vocabulary: int, token_id: Callable[[Any], int] = int) -> Oracle:
    """The oracle of a list problem.

    Args:
        problem: its items may be token ids already; all n! orders count as right for `shuffle`, the input too.
        vocabulary: the number of token ids.
        token_id: the id of an item, for items of another kind; different items need different ids.
    """
    if problem.operation == "shuffle":
        return ShuffleOracle([token_id(item) for item in problem.items], vocabulary)
    return CountingOracle([[token_id(item) for item in answer] for answer in problem.answers()], vocabulary)
