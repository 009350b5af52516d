"""A forward pass takes rows: the packed, unpadded rows of many sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hasten.model.attention import Part


class Storage(Protocol):
    """A block of the cache: per group of layers of one shape [2, layers, kv_heads, capacity, head_dim].

    `positions` is int64 [capacity], the position of each slot's row.
    """

    capacity: int
    storage: list[Tensor]
    positions: Tensor


class PendingStates(Protocol):
    """What a recurrent layer leaves of a pass: enough to say its state behind any of the pending rows."""

    def after(self, before: tuple[Tensor, ...] | None, rows: Sequence[int]) -> tuple[Tensor, ...]:
        """The state behind some pending rows, which follow each other (ascending numbers, at least one).

        Args:
            before: the state behind the committed rows; None before the first.
        """


class SequenceState(Protocol):
    """What the model needs from a sequence's cache; `hasten.cache.SequenceCache` is the implementation.

    Between `begin` and the caller's commit, the rows of the running forward are *pending*: stored behind the
    committed slots, visible to each other only through the rows-by-rows mask.
    """

    pending: int

    def begin(self, positions: Tensor, extend: bool = False) -> None:
        """Make room for rows at these positions [rows]; what was pending before is dropped, or extended."""

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store the rows' keys and values, both [kv_heads, rows, head_dim]."""

    def blocks(self) -> Sequence[tuple[Storage, int]]:
        """The blocks of the cache and how many of their slots are committed; the last holds the pending rows behind."""

    def parts(self, layer: int, mask: Tensor | Literal["all"] | None) -> Sequence[Part]:
        """What the rows attend to in a layer; `mask` is additive [rows, pending], or as in `Span`."""

    def state(self, layer: int) -> tuple[Tensor, ...] | None:
        """A recurrent layer's state behind the committed rows; None before the first."""

    def pending_states(self, layer: int) -> PendingStates | None:
        """What earlier passes left of a recurrent layer for rows that this pass extends; None where there are none."""

    def leave(self, layer: int, states: PendingStates) -> None:
        """A recurrent layer's states behind all pending rows, those of earlier passes included."""


@dataclass
class Span:
    """The rows `start:stop` of a packed batch: all of one sequence.

    `mask` is boolean [rows, rows]: row i sees row j where it is True (the diagonal always is). None means
    causal: row i sees rows 0..i; `"all"` that every row sees every other, as in a block under construction.
    With `extend`, rows that earlier passes left pending stay, and the mask is [rows, pending], theirs first: a
    draft model grows a tree this way, level by level.
    """

    sequence: SequenceState
    start: int
    stop: int
    mask: Tensor | Literal["all"] | None = None
    extend: bool = False

    def parents(self, pending: int) -> list[int]:
        """The pending row that each row follows, by number; -1 for those that follow the committed ones.

        Args:
            pending: how many rows are, these included.

        Raises:
            ValueError: rows that see each other both ways follow nothing.
        """
        count = self.stop - self.start
        if isinstance(self.mask, str):
            raise ValueError("a recurrent layer needs rows in order, and these all see each other")
        first = pending - count
        if self.mask is None:
            return list(range(first - 1, pending - 1))
        seen = [self.mask[row, : first + row].nonzero().flatten() for row in range(count)]
        return [int(rows[-1]) if len(rows) else -1 for rows in seen]

    def dense_mask(self, pending: int) -> Tensor | None:
        """The mask as a tensor [rows, pending] where there is one, for backends without an `"all"`; None is causal."""
        if isinstance(self.mask, str):
            return torch.ones(self.stop - self.start, pending, dtype=torch.bool)
        return self.mask


@dataclass
class Rows:
    """The input of a forward pass.

    Attributes:
        tokens: int64 [rows] token ids; -1 marks a row that enters as an embedding.
        positions: int64 [rows], explicit: never derived from the cache, not necessarily monotonic or unique.
        spans: which rows belong to which sequence, in order, covering every row once.
        embeddings: [rows, hidden], read where `tokens` is -1.
    """

    tokens: Tensor
    positions: Tensor
    spans: list[Span]
    embeddings: Tensor | None = None

    @classmethod
    def of(cls, sequence: SequenceState, tokens: Sequence[int], start: int, device: torch.device | str = "cpu") -> Rows:
        """A causal chain of tokens at positions `start, start+1, ..` of one sequence."""
        count = len(tokens)
        return cls(
            tokens=torch.tensor(tokens, dtype=torch.int64, device=device),
            positions=torch.arange(start, start + count, device=device),
            spans=[Span(sequence, 0, count)],
        )
