"""The slots of a group of layers in shared blocks: how a sequence keeps keys and values where nothing is compressed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from hasten.cache.block import Block
from hasten.cache.window import Band
from hasten.errors import UserError
from hasten.model.attention import Part, attend, kernel_for
from hasten.model.config import LayerConfig
from hasten.model.layout import Group


class Blocks(Protocol):
    """Where blocks come from, and go: `Cache`."""

    layers: tuple[LayerConfig, ...]
    dtype: torch.dtype
    device: torch.device

    def block(self, group: Group, capacity: int, ideal: int = 0) -> Block: ...

    def drop(self, block: Block) -> None: ...


class GroupCache(Protocol):
    """What a sequence keeps for the layers of a group. Methods that keep less, or otherwise, write one of their own.

    Rows are pending from `begin` to the next `begin` or `commit`, and see each other only by the pass's mask.

    Attributes:
        length: slots that are kept of committed rows.
    """

    length: int

    @property
    def room(self) -> int:
        """Slots behind the last one for which there is memory already."""

    def reserve(self, slots: int, more: int = 0) -> None:
        """Make room for so many further slots, and for `more` behind them where the cache's limit allows.

        Raises:
            UserError: the cache is full.
        """

    def make_room(self, rows: int) -> None:
        """Make room for a pass of so many rows, and for more behind them where the cache's limit allows.

        Raises:
            UserError: the cache is full.
        """

    def begin(self, positions: Tensor, extend: bool = False) -> None:
        """See `hasten.model.rows.SequenceState`."""

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """See `hasten.model.rows.SequenceState`; layers are counted within the group."""

    def attend(
        self, layer: int, queries: Tensor, mask: Tensor | Literal["all"] | None, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """See `hasten.model.rows.SequenceState`; `window` is that of the layer which asks."""

    def attend_behind(
        self, layer: int, queries: Tensor, mask: Tensor | Literal["all"] | None, slots: int
    ) -> tuple[Tensor, Tensor]:
        """See `hasten.model.rows.SequenceState`; asked only where there is `memory`."""

    def memory(self) -> list[tuple[Block, int]] | None:
        """See `hasten.model.rows.SequenceState`."""

    def commit(self, rows: Sequence[int]) -> None:
        """Keep the pending rows with these numbers, which ascend strictly; perhaps none."""

    def withdraw(self, rows: int) -> None:
        """Take back the latest so many pending rows."""

    def crop(self, count: int) -> None:
        """Forget the latest `count` rows that were committed, and all pending ones.

        Raises:
            RollbackError: what was made of them cannot be undone.
        """

    def evict(self, slots: Sequence[int]) -> None:
        """Forget the committed slots with these numbers, which ascend strictly, and all pending rows."""

    def fork(self) -> GroupCache:
        """A second one with the same content."""

    def trim(self) -> None:
        """Give back room that is not used, as far as that is possible."""

    def release(self) -> None:
        """Give everything back."""

    def nbytes(self) -> int:
        """Of all that it reads, what others read as well included."""


@dataclass
class BlockView:
    """The first `length` slots of a block, as one sequence sees them."""

    block: Block
    length: int


class SlotCache:
    """A `GroupCache` that keeps every slot as it was written, in blocks.

    Forks share blocks: the writer goes on behind what others see, and starts a block of its own where it would
    overwrite that.
    """

    def __init__(self, cache: Blocks, group: Group) -> None:
        self._cache, self._group = cache, group
        self._views: list[BlockView] = []
        self._writer = False
        self.length = self.pending = self._rows = 0
        self._bands: dict[int, Band] = {}

    def memory(self) -> list[tuple[Block, int]]:
        """See `hasten.model.rows.SequenceState`."""
        return [(view.block, view.length) for view in self._views]

    @property
    def room(self) -> int:
        """See `GroupCache`."""
        return self._views[-1].block.capacity - self._views[-1].length if self._views else 0

    def reserve(self, slots: int, more: int = 0) -> None:
        """See `GroupCache`."""
        self._room(slots, slots + more)

    def make_room(self, rows: int) -> None:
        """See `GroupCache`."""
        self._room(rows)

    # The forward pass

    def begin(self, positions: Tensor, extend: bool = False) -> None:
        """See `hasten.model.rows.SequenceState`."""
        if not extend:
            self.pending = 0
        self._bands.clear()
        rows = positions.shape[0]
        tail = self._room(self.pending + rows)
        start = tail.length + self.pending
        tail.block.positions[start : start + rows] = positions if positions.dim() == 1 else positions[:, 0]
        self.pending += rows
        self._rows = rows

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """See `GroupCache`."""
        tail = self._views[-1]
        stop = tail.length + self.pending
        tail.block.keys[layer][:, stop - self._rows : stop] = keys
        tail.block.values[layer][:, stop - self._rows : stop] = values

    def attend(
        self, layer: int, queries: Tensor, mask: Tensor | Literal["all"] | None, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """See `GroupCache`."""
        return attend(queries, self.parts(layer, mask, window), kernel_for(self._cache.device))

    def attend_behind(
        self, layer: int, queries: Tensor, mask: Tensor | Literal["all"] | None, slots: int
    ) -> tuple[Tensor, Tensor]:
        """See `GroupCache`."""
        return attend(queries, self.parts(layer, mask, behind=slots), kernel_for(self._cache.device))

    def parts(
        self, layer: int, mask: Tensor | Literal["all"] | None, window: int | None = None, behind: int = 0
    ) -> list[Part]:
        """What the rows of this pass attend to: committed blocks without a mask, then the rows themselves.

        Args:
            behind: so many of the first slots are left out, where there is no window.
        """
        if window is not None:
            return self._windowed(layer, window, mask)
        parts = []
        for view in self._views[:-1]:
            start, keys, values = min(behind, view.length), view.block.keys[layer], view.block.values[layer]
            behind -= start
            if start < view.length:
                parts.append(Part(keys[:, start : view.length], values[:, start : view.length]))
        tail = self._views[-1]
        keys, values, stop = tail.block.keys[layer], tail.block.values[layer], tail.length + self.pending
        if self.pending == 1 or (self._rows == 1 and mask is None):
            # A single new row sees itself and everything before it: the whole tail is one part.
            parts.append(Part(keys[:, behind:stop], values[:, behind:stop]))
            return parts
        if behind < tail.length:
            parts.append(Part(keys[:, behind : tail.length], values[:, behind : tail.length]))
        own: Tensor | Literal["causal"] | None
        if mask is None:
            own = "causal" if self._rows == self.pending else self._causal()
        else:
            own = None if isinstance(mask, str) else mask
        parts.append(Part(keys[:, tail.length : stop], values[:, tail.length : stop], own))
        return parts

    def _windowed(self, layer: int, window: int, mask: Tensor | Literal["all"] | None) -> list[Part]:
        """As `parts`, keeping only slots whose position lies inside the rows' windows."""
        band = self._bands.get(window)
        tail = self._views[-1]
        stop = tail.length + self.pending
        if band is None:
            if isinstance(mask, str):
                mask = torch.zeros(self._rows, self.pending, dtype=self._cache.dtype, device=self._cache.device)
            own = self._causal() if mask is None else mask
            committed = [view.block.positions[: view.length] for view in self._views]
            band = self._bands[window] = Band.of(committed, tail.block.positions[tail.length : stop], window, own)
        keys, values = tail.block.keys[layer], tail.block.values[layer]
        # First, because every row sees itself: no merge ever starts from a row that has seen nothing.
        parts = [Part(keys[:, tail.length : stop], values[:, tail.length : stop], band.own)]
        for view, pieces in zip(self._views, band.committed, strict=True):
            keys, values = view.block.keys[layer], view.block.values[layer]
            for start, stop, allowed, blind in pieces:
                parts.append(Part(keys[:, start:stop], values[:, start:stop], allowed, blind))
        return parts

    def _causal(self) -> Tensor:
        """Additive [rows, pending]: each row of this pass sees the pending rows up to itself."""
        shape = (self._rows, self.pending)
        mask = torch.full(shape, -torch.inf, dtype=self._cache.dtype, device=self._cache.device)
        return mask.triu_(self.pending - self._rows + 1)

    # Transactions

    def commit(self, rows: Sequence[int]) -> None:
        """See `GroupCache`."""
        count = len(rows)
        if count:
            tail = self._views[-1]
            if rows[-1] != count - 1:
                tail.block.take(tail.block, [tail.length + row for row in rows], tail.length)
            tail.length += count
            self.length += count
        self.pending = 0

    def withdraw(self, rows: int) -> None:
        """See `GroupCache`."""
        self.pending -= rows

    def crop(self, count: int) -> None:
        """See `GroupCache`; a slot per row, so that this is always possible."""
        self.pending = 0
        self.length -= count
        while count:
            tail = self._views[-1]
            cut = min(count, tail.length)
            tail.length -= cut
            count -= cut
            if tail.length == 0 and len(self._views) > 1:
                self._cache.drop(self._views.pop().block)
                self._writer = False

    def evict(self, slots: Sequence[int]) -> None:
        """See `GroupCache`. What others may read stays as it is: what is kept of it is copied.

        Raises:
            UserError: the cache is too full for the copy; nothing is forgotten.
        """
        if not slots:
            return
        self.pending = 0
        before = self.length - self._views[-1].length
        tail, first = self._views[-1], slots[0] - before
        gone = set(slots)
        # Who writes behind the tail's end may also write what nobody else reads.
        if first >= 0 and self._may_write(tail) and first >= tail.block.shared:
            kept = [slot for slot in range(first, tail.length) if before + slot not in gone]
            if kept:
                tail.block.take(tail.block, kept, first)
            tail.length = first + len(kept)
        else:
            self._rewrite(gone)
        self.length -= len(slots)

    def _rewrite(self, gone: set[int]) -> None:
        """All slots but these in one new block."""
        fresh = self._cache.block(self._group, self.length - len(gone))
        start = filled = 0
        for view in self._views:
            kept = [slot for slot in range(view.length) if start + slot not in gone]
            if kept:
                fresh.take(view.block, kept, filled)
                filled += len(kept)
            start += view.length
            self._cache.drop(view.block)
        self._views, self._writer = [BlockView(fresh, filled)], True

    def fork(self) -> Self:
        """See `GroupCache`; blocks are shared, and copied by nobody. A subclass that holds more gives that, too."""
        child = type(self)(self._cache, self._group)
        child.length = self.length
        for view in self._views:
            view.block.references += 1
            child._views.append(BlockView(view.block, view.length))
        if self._views:
            tail = self._views[-1]
            tail.block.shared = max(tail.block.shared, tail.length)
        return child

    def trim(self) -> None:
        """Give back slots behind the last one, where nobody else reads the block and the copy still fits beside it."""
        self.pending = 0
        tail = self._views[-1] if self._views else None
        if tail is None or tail.block.references > 1:
            return
        try:
            smaller = self._cache.block(self._group, tail.length)
        except UserError:
            return
        if smaller.capacity >= tail.block.capacity:
            return self._cache.drop(smaller)
        smaller.copy_from(tail.block, tail.length)
        self._cache.drop(tail.block)
        tail.block = smaller

    def release(self) -> None:
        """See `GroupCache`."""
        for view in self._views:
            self._cache.drop(view.block)
        self._views, self.length, self.pending = [], 0, 0
        self._bands.clear()

    def nbytes(self) -> int:
        """See `GroupCache`."""
        return sum(view.block.nbytes() for view in self._views)

    def _may_write(self, tail: BlockView) -> bool:
        """Whether slots behind the tail's length are this sequence's to fill."""
        if tail.block.references == 1:
            tail.block.shared = 0
            self._writer = True
        return self._writer and tail.length >= tail.block.shared

    def _room(self, slots: int, wanted: int = 0) -> BlockView:
        """The tail view, with room for `slots` more slots that nobody else reads; a new block has room for `wanted`.

        Without such a wish, a block that is outgrown doubles.
        """
        tail = self._views[-1] if self._views else None
        ideal = wanted
        if tail is not None and self._may_write(tail):
            if tail.length + slots <= tail.block.capacity:
                return tail
            ideal = tail.length + wanted if wanted else 2 * tail.block.capacity
            if tail.block.references == 1:
                grown = self._cache.block(self._group, tail.length + slots, ideal)
                grown.copy_from(tail.block, tail.length + self.pending)
                self._cache.drop(tail.block)
                tail.block = grown
                return tail
        view = BlockView(self._cache.block(self._group, slots, ideal), 0)
        if tail is not None and self.pending:
            view.block.take(tail.block, range(tail.length, tail.length + self.pending), 0)
        if tail is not None and tail.length == 0:
            # Only the last view may be empty: elsewhere it would be a part without slots.
            self._cache.drop(self._views.pop().block)
        self._views.append(view)
        self._writer = True
        return view
