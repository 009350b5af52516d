"""The cache of one sequence: committed slots in shared blocks, and the running forward's pending rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from hasten.cache.block import Block
from hasten.cache.recurrent import State
from hasten.errors import UserError
from hasten.model.attention import Part
from hasten.model.config import LayerConfig
from hasten.model.rows import PendingStates


class RollbackError(RuntimeError):
    """A recurrent layer was asked to forget rows of an earlier commit than the latest."""


class Blocks(Protocol):
    """Where a sequence's blocks come from, and go: `Cache`."""

    layers: tuple[LayerConfig, ...]
    dtype: torch.dtype
    device: torch.device

    def block(self, capacity: int, ideal: int = 0) -> Block: ...

    def drop(self, block: Block) -> None: ...


@dataclass
class BlockView:
    """The first `length` slots of a block, as one sequence sees them."""

    block: Block
    length: int


@dataclass(frozen=True)
class Snapshot:
    """A sequence's state at one length, for layers that cannot be cropped."""

    length: int
    states: dict[int, State]


@dataclass(frozen=True)
class _Commit:
    """The latest commit, as far as recurrent layers are concerned: the way back to any of its rows."""

    length: int
    states: dict[int, State]
    rows: list[int]
    pending: dict[int, PendingStates]

    def at(self, length: int) -> dict[int, State]:
        """The states when the sequence had this length."""
        rows = self.rows[: length - self.length]
        return {
            **self.states,
            **{layer: left.after(self.states.get(layer), rows) for layer, left in self.pending.items() if rows},
        }


class SequenceCache:
    """Slots of one sequence, in order.

    `length` slots are committed; only to be read. A forward makes `pending` more rows visible to each other; `commit`
    keeps some of them, and rows not committed vanish with the next `begin`. Made by `Cache.sequence`, not directly.

    A recurrent layer has a state instead of slots. It leaves what its state is behind each pending row, so that a
    commit can keep any of them; a crop can go back to any row of the latest commit.
    """

    def __init__(self, cache: Blocks) -> None:
        self._cache = cache
        self._views: list[BlockView] = []
        self._writer = False
        self.length = 0
        self.pending = 0
        self._rows = 0
        self.states: dict[int, State] = {}
        self._left: dict[int, PendingStates] = {}
        self._latest: _Commit | None = None
        self._bands: dict[int, _Band] = {}
        self._released = False

    def blocks(self) -> list[tuple[Block, int]]:
        """See `hasten.model.rows.SequenceState`."""
        return [(view.block, view.length) for view in self._views]

    @property
    def room(self) -> int:
        """Slots behind the last one that are there already."""
        return self._views[-1].block.capacity - self._views[-1].length if self._views else 0

    def reserve(self, slots: int, more: int = 0) -> None:
        """Make room for `slots` further slots, so that appends need not grow the block again.

        Args:
            more: slots behind them, as many as the cache's limit allows, if there must be a new block.

        Raises:
            UserError: the cache is full.
        """
        self._refuse_released()
        self._room(slots, slots + more)

    def make_room(self, rows: int) -> None:
        """Make room for a pass of so many rows, and for more behind them where the cache's limit allows.

        Raises:
            UserError: the cache is full.
        """
        self._refuse_released()
        self._room(rows)

    # The forward pass

    def begin(self, positions: Tensor, extend: bool = False) -> None:
        """See `hasten.model.rows.SequenceState`."""
        self._refuse_released()
        if not extend:
            self.pending = 0
            self._left = {}
        self._bands.clear()
        rows = positions.shape[0]
        tail = self._room(self.pending + rows)
        start = tail.length + self.pending
        tail.block.positions[start : start + rows] = positions
        self.pending += rows
        self._rows = rows

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """See `hasten.model.rows.SequenceState`."""
        tail = self._views[-1]
        stop = tail.length + self.pending
        tail.block.keys[layer][:, stop - self._rows : stop] = keys
        tail.block.values[layer][:, stop - self._rows : stop] = values

    def parts(self, layer: int, mask: Tensor | Literal["all"] | None) -> list[Part]:
        """See `hasten.model.rows.SequenceState`: committed blocks without a mask, then the rows."""
        window = self._cache.layers[layer].window
        if window is not None:
            return self._windowed(layer, window, mask)
        parts = [
            Part(view.block.keys[layer][:, : view.length], view.block.values[layer][:, : view.length])
            for view in self._views[:-1]
            if view.length
        ]
        tail = self._views[-1]
        keys, values, stop = tail.block.keys[layer], tail.block.values[layer], tail.length + self.pending
        if self.pending == 1 or (self._rows == 1 and mask is None):
            # A single new row sees itself and everything before it: the whole tail is one part.
            parts.append(Part(keys[:, :stop], values[:, :stop]))
            return parts
        if tail.length:
            parts.append(Part(keys[:, : tail.length], values[:, : tail.length]))
        own: Tensor | Literal["causal"] | None
        if mask is None:
            own = "causal" if self._rows == self.pending else self._causal()
        else:
            own = None if isinstance(mask, str) else mask
        parts.append(Part(keys[:, tail.length : stop], values[:, tail.length : stop], own))
        return parts

    def state(self, layer: int) -> State | None:
        """See `hasten.model.rows.SequenceState`."""
        return self.states.get(layer)

    def pending_states(self, layer: int) -> PendingStates | None:
        """See `hasten.model.rows.SequenceState`."""
        return self._left.get(layer)

    def leave(self, layer: int, states: PendingStates) -> None:
        """See `hasten.model.rows.SequenceState`."""
        self._left[layer] = states

    def _windowed(self, layer: int, window: int, mask: Tensor | Literal["all"] | None) -> list[Part]:
        """As `parts`, keeping only slots whose position lies inside the rows' windows."""
        band = self._bands.get(window)
        if band is None:
            if isinstance(mask, str):
                mask = torch.zeros(self._rows, self.pending, dtype=self._cache.dtype, device=self._cache.device)
            own = self._causal() if mask is None else mask
            band = self._bands[window] = _Band.of(self._views, self.pending, window, own)
        tail = self._views[-1]
        stop = tail.length + self.pending
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

    def commit(self, kept: int | Sequence[int]) -> None:
        """Keep pending rows: the first `kept` of them, or the rows with these (ascending) numbers.

        Raises:
            ValueError: numbers out of range or not strictly ascending.
        """
        self._refuse_released()
        if isinstance(kept, int) and kept < 0:
            raise ValueError(f"cannot keep {kept} rows")
        rows = range(kept) if isinstance(kept, int) else kept
        count = len(rows)
        if count and (rows[0] < 0 or rows[-1] >= self.pending or any(a >= b for a, b in pairwise(rows))):
            raise ValueError(f"kept rows {list(rows)} are not ascending numbers below {self.pending}")
        if count:
            if self._left:
                self._latest = _Commit(self.length, self.states, list(rows), self._left)
                self.states = self._latest.at(self.length + count)
            tail = self._views[-1]
            if rows[-1] != count - 1:
                tail.block.gather(tail.length, rows)
            tail.length += count
            self.length += count
        self.pending = 0
        self._left = {}

    def crop(self, length: int) -> None:
        """Forget committed slots from `length` on, and all pending rows.

        Raises:
            ValueError: a length beyond what is committed.
            RollbackError: a recurrent layer would have to forget more than the latest commit.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop {self.length} slots to {length}")
        if length < self.length and self._recurrent:
            latest = self._latest
            if latest is None or not latest.length <= length <= latest.length + len(latest.rows):
                raise RollbackError(
                    f"cannot crop {self.length} slots to {length}: layer {self._recurrent[0]} is recurrent, and goes "
                    "back to rows of the latest commit only; restore a snapshot and replay"
                )
            self.states = latest.at(length)
        self._crop(length)

    @property
    def _recurrent(self) -> list[int]:
        return [index for index, layer in enumerate(self._cache.layers) if layer.kind == "recurrent"]

    def _crop(self, length: int) -> None:
        self.pending = 0
        self._left = {}
        excess, self.length = self.length - length, length
        while excess:
            tail = self._views[-1]
            cut = min(excess, tail.length)
            tail.length -= cut
            excess -= cut
            if tail.length == 0 and len(self._views) > 1:
                self._cache.drop(self._views.pop().block)
                self._writer = False

    def evict(self, slots: Sequence[int]) -> None:
        """Forget committed slots with these (ascending) numbers, and all pending rows; what is behind them moves up.

        Without numbers nothing happens: pending rows stay, too.

        Raises:
            ValueError: numbers out of range or not ascending, slots outside of the last block or that others may read.
            RollbackError: a recurrent layer would have to forget.
        """
        self._refuse_released()
        if not slots:
            return
        before = self.length - self._views[-1].length if self._views else 0
        if slots[0] < 0 or slots[-1] >= self.length or any(a >= b for a, b in pairwise(slots)):
            raise ValueError(f"evicted slots {list(slots)} are not ascending numbers below {self.length}")
        if self._recurrent:
            raise RollbackError(f"cannot evict {len(slots)} slots: layer {self._recurrent[0]} is recurrent")
        tail, first = self._views[-1], slots[0] - before
        # Who writes behind the tail's end may also write what nobody else reads.
        if first < 0 or not self._may_write(tail) or first < tail.block.shared:
            raise ValueError(f"slot {slots[0]} is not in the last block, or another sequence may read it")
        gone = {slot - slots[0] for slot in slots}
        kept = [slot for slot in range(tail.length - first) if slot not in gone]
        self.pending = 0
        if kept:
            tail.block.gather(first, kept)
        tail.length = first + len(kept)
        self.length -= len(slots)

    def fork(self) -> SequenceCache:
        """A second sequence with the same committed slots; blocks are shared, and copied by nobody."""
        self._refuse_released()
        child = SequenceCache(self._cache)
        child.length = self.length
        for view in self._views:
            view.block.references += 1
            child._views.append(BlockView(view.block, view.length))
        if self._views:
            tail = self._views[-1]
            tail.block.shared = max(tail.block.shared, tail.length)
        child.states = dict(self.states)
        return child

    def release(self) -> None:
        """Give the slots back; the sequence is unusable afterwards. Releasing twice is harmless."""
        for view in self._views:
            self._cache.drop(view.block)
        self._views, self.length, self.pending, self._released = [], 0, 0, True
        self.states, self._left, self._latest = {}, {}, None
        self._bands.clear()

    def trim(self) -> None:
        """Give back slots behind the last one, where nobody else reads the block and the copy still fits beside it."""
        self._refuse_released()
        self.pending, self._left = 0, {}
        tail = self._views[-1] if self._views else None
        if tail is None or tail.block.references > 1:
            return
        try:
            smaller = self._cache.block(tail.length)
        except UserError:
            return
        if smaller.capacity >= tail.block.capacity:
            return self._cache.drop(smaller)
        smaller.copy_from(tail.block, 0, tail.length)
        self._cache.drop(tail.block)
        tail.block = smaller

    def nbytes(self) -> int:
        """Of all blocks that it reads, those that it shares included."""
        return sum(view.block.nbytes() for view in self._views)

    def snapshot(self) -> Snapshot:
        """The states of all recurrent layers at the present length, pending rows left out."""
        return Snapshot(self.length, dict(self.states))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot taken at this or a shorter length; rows after it must be replayed.

        Raises:
            ValueError: the snapshot is longer than the sequence.
        """
        if snapshot.length > self.length:
            raise ValueError(f"the snapshot has {snapshot.length} slots, the sequence only {self.length}")
        self._crop(snapshot.length)
        self.states, self._latest = dict(snapshot.states), None

    def _refuse_released(self) -> None:
        if self._released:
            raise RuntimeError("the sequence was released")

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
                grown = self._cache.block(tail.length + slots, ideal)
                grown.copy_from(tail.block, 0, tail.length + self.pending)
                self._cache.drop(tail.block)
                tail.block = grown
                return tail
        view = BlockView(self._cache.block(slots, ideal), 0)
        if tail is not None and self.pending:
            view.block.copy_from(tail.block, tail.length, tail.length + self.pending)
        if tail is not None and tail.length == 0:
            # Only the last view may be empty: elsewhere it would be a part without slots.
            self._cache.drop(self._views.pop().block)
        self._views.append(view)
        self._writer = True
        return view


@dataclass
class _Band:
    """Which slots a windowed layer's rows see: computed once per pass and window, used by all such layers.

    `committed` has, per view, runs (start, stop, additive mask or None, blind rows); `own` is the mask of the
    rows among themselves.
    """

    committed: list[list[tuple[int, int, Tensor | None, Tensor | None]]]
    own: Tensor

    @classmethod
    def of(cls, views: Sequence[BlockView], pending: int, window: int, mask: Tensor) -> _Band:
        tail = views[-1]
        waiting = tail.block.positions[tail.length : tail.length + pending]
        rows = waiting[pending - mask.shape[0] :]
        first, last = int(rows.min()), int(rows.max())
        committed = []
        for view in views:
            slots = view.block.positions[: view.length]
            seen = slots > first - window
            # Slots every row sees need no mask; the edge of the window does.
            free = slots > last - window
            pieces: list[tuple[int, int, Tensor | None, Tensor | None]] = []
            for start, stop in _runs(seen):
                cut = start + int((~free[start:stop]).sum())
                if bool(free[cut:stop].all()):
                    bounds = [(start, cut, True), (cut, stop, False)]
                else:
                    bounds = [(start, stop, True)]
                for low, high, edge in bounds:
                    if low == high:
                        continue
                    if not edge:
                        pieces.append((low, high, None, None))
                        continue
                    allowed = slots[None, low:high] > rows[:, None] - window
                    extra = torch.zeros(allowed.shape, dtype=mask.dtype, device=rows.device).masked_fill_(
                        ~allowed, -torch.inf
                    )
                    pieces.append((low, high, extra, ~allowed.any(1)))
            committed.append(pieces)
        outside = waiting[None, :] <= rows[:, None] - window
        return cls(committed, mask.masked_fill(outside, -torch.inf))


def _runs(flags: Tensor) -> list[tuple[int, int]]:
    """The runs (start, stop) of True in a boolean vector."""
    padded = torch.cat([flags.new_zeros(1), flags, flags.new_zeros(1)]).to(torch.int8)
    edges = padded.diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
