"""A forward pass takes rows: the packed, unpadded rows of many sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from hasten.model.layout import Layout


class Storage(Protocol):
    """A block of a group of layers' slots.

    Attributes:
        keys: [layers, heads, capacity, key_width].
        values: [layers, heads, capacity, value_width]; in memory right behind the keys.
        positions: int64 [capacity], of each slot's row; of several axes the first.
        addresses: of these three in memory.
    """

    capacity: int
    keys: Tensor
    values: Tensor
    positions: Tensor
    addresses: tuple[int, int, int]


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
    layout: Layout

    def begin(self, positions: Tensor, extend: bool = False) -> None:
        """Make room for rows at these positions, [rows] or [rows, axes]; what was pending is dropped, or extended."""

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store the rows' keys [heads, rows, key_width] and values [heads, rows, value_width]."""

    def attend(self, layer: int, queries: Tensor, mask: Tensor | Literal["all"] | None) -> tuple[Tensor, Tensor]:
        """Attention of this pass's rows over all that they see in a layer: committed slots, and pending rows.

        Args:
            queries: [rows, heads, key_width], rotated, in the cache's dtype.
            mask: of the pending rows, additive [rows, pending], or as in `Span`.

        Returns:
            The output [rows, heads, value_width], and the log-sum-exp of the scores [rows, heads], base e.
        """

    def attend_behind(
        self, layer: int, queries: Tensor, mask: Tensor | Literal["all"] | None, slots: int
    ) -> tuple[Tensor, Tensor]:
        """As `attend`, less the first so many slots of `memory`, which somebody else attends to; without a window."""

    def memory(self, group: int) -> Sequence[tuple[Storage, int]] | None:
        """A group's slots where they are plain memory: blocks, and how many slots of each are committed.

        The last block holds the pending rows behind them. None: only the cache itself can attend.
        """

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


@dataclass(frozen=True, eq=False)
class Join:
    """Rows that enter a pass in its middle, made of another row's state there: by a linear map, a vector, or both.

    Below their layer they are nothing: what happens to them there is left open, and no other row may see them.

    Attributes:
        layer: at whose input they enter.
        matrices: float32 [rows, hidden, hidden], contiguous; None leaves the state as it is.
        vectors: float32 [rows, hidden], contiguous, which are added; None adds nothing.

    Raises:
        ValueError: neither of the two.
    """

    layer: int
    matrices: Tensor | None = None
    vectors: Tensor | None = None

    def __post_init__(self) -> None:
        if self.matrices is None and self.vectors is None:
            raise ValueError("rows that join need matrices or vectors")

    def __len__(self) -> int:
        given = self.vectors if self.matrices is None else self.matrices
        assert given is not None
        return len(given)

    def of(self, state: Tensor) -> Tensor:
        """As what the rows enter, float32 [rows, hidden], where their source's state [hidden] is this one."""
        mapped = state.float() if self.matrices is None else self.matrices @ state.float()
        return (mapped if self.vectors is None else mapped + self.vectors).expand(len(self), -1)

    def addresses(self, row: int) -> tuple[int | None, int | None]:
        """Of a row's matrix and of its vector in memory."""
        return _address(self.matrices, row), _address(self.vectors, row)


def _address(tensor: Tensor | None, row: int) -> int | None:
    return None if tensor is None else tensor.data_ptr() + row * tensor.stride(0) * tensor.itemsize


@dataclass
class Rows:
    """The input of a forward pass.

    Attributes:
        tokens: int64 [rows] token ids; -1 marks a row that enters as an embedding.
        positions: int64 [rows], explicit: never derived from the cache, not necessarily monotonic or unique. With
            several axes (time, height and width of an image) [rows, axes], of which the first counts for windows.
        spans: which rows belong to which sequence, in order, covering every row once.
        embeddings: [rows, hidden], read where `tokens` is -1.
        beside: int64 [rows], the token that stands beside each row, for layers that read one (`PairedLayer`).
        joins: rows that enter later: the number of the first one, that of the row which they are made of, and how.
    """

    tokens: Tensor
    positions: Tensor
    spans: list[Span]
    embeddings: Tensor | None = None
    beside: Tensor | None = None
    joins: Sequence[tuple[int, int, Join]] = ()

    @classmethod
    def of(cls, sequence: SequenceState, tokens: Sequence[int], start: int, device: torch.device | str = "cpu") -> Rows:
        """A causal chain of tokens at positions `start, start+1, ..` of one sequence."""
        return cls.of_several([(sequence, tokens, start)], device)

    @classmethod
    def of_several(
        cls, chains: Iterable[tuple[SequenceState, Sequence[int], int]], device: torch.device | str = "cpu"
    ) -> Rows:
        """Causal chains of several sequences, one behind the other.

        Args:
            chains: of each its sequence, its tokens, and the position of the first of them.
        """
        ids: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        for sequence, tokens, start in chains:
            spans.append(Span(sequence, len(ids), len(ids) + len(tokens)))
            ids += tokens
            positions += range(start, start + len(tokens))
        numbers = torch.tensor([ids, positions], dtype=torch.int64, device=device)
        return cls(numbers[0], numbers[1], spans)
