"""The cache of one sequence: what its groups of layers keep, and its recurrent layers' states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

from torch import Tensor

from hasten.cache.block import Block
from hasten.cache.recurrent import RollbackError, State
from hasten.cache.slots import GroupCache
from hasten.model.config import LayerConfig
from hasten.model.config import State as KeptState
from hasten.model.layout import Layout
from hasten.model.rows import PendingStates


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


class States(Protocol):
    """Where the bytes of recurrent states are counted: `Cache`."""

    layers: tuple[LayerConfig, ...]
    state_bytes: int

    def take(self, count: int) -> None: ...

    def give(self, count: int) -> None: ...


class SequenceCache:
    """What a sequence keeps: for each group of layers some slots, for each recurrent layer a state.

    `length` rows are committed, only to be read; a group may keep fewer slots of them. A forward makes `pending` more
    rows visible to each other; `commit` keeps some of them, and rows not committed vanish with the next `begin`. Made
    by `Cache.sequence`, not directly.

    A recurrent layer leaves what its state is behind each pending row, so that a commit can keep any of them; a crop
    can go back to any row of the latest commit.
    """

    def __init__(self, cache: States, layout: Layout, groups: Sequence[GroupCache]) -> None:
        self._cache, self.layout, self.groups = cache, layout, list(groups)
        self.length = 0
        self.pending = 0
        self.states: dict[int, State] = {}
        self._left: dict[int, PendingStates] = {}
        self._latest: _Commit | None = None
        # Whether the bytes of the states are counted.
        self._holds = not cache.state_bytes
        self._released = False

    def memory(self, group: int) -> list[tuple[Block, int]] | None:
        """See `hasten.model.rows.SequenceState`."""
        return self.groups[group].memory()

    @property
    def room(self) -> int:
        """Rows behind the last one for which every group has memory already."""
        return min((group.room for group in self.groups), default=0)

    def reserve(self, slots: int, more: int = 0) -> None:
        """Make room for `slots` further slots of each group, so that appends need not grow their blocks again.

        Args:
            more: slots behind them, as many as the cache's limit allows, if there must be new blocks.

        Raises:
            UserError: the cache is full.
        """
        self._refuse_released()
        if not self._holds:
            self._hold()
        for group in self.groups:
            group.reserve(slots, more)

    def make_room(self, rows: int) -> None:
        """Make room for a pass of so many rows, and for more behind them where the cache's limit allows.

        Raises:
            UserError: the cache is full.
        """
        self._refuse_released()
        if not self._holds:
            self._hold()
        for group in self.groups:
            group.make_room(rows)

    # The forward pass

    def begin(self, positions: Tensor, extend: bool = False) -> None:
        """See `hasten.model.rows.SequenceState`."""
        self._refuse_released()
        if not self._holds:
            self._hold()
        if not extend:
            self._forget_pending()
        for group in self.groups:
            group.begin(positions, extend)
        self.pending += positions.shape[0]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """See `hasten.model.rows.SequenceState`."""
        self.groups[self.layout.group_of[layer]].write(self.layout.index_of[layer], keys, values)

    def attend(self, layer: int, queries: Tensor, mask: Tensor | Literal["all"] | None) -> tuple[Tensor, Tensor]:
        """See `hasten.model.rows.SequenceState`."""
        group, window = self.groups[self.layout.group_of[layer]], self._cache.layers[layer].window
        return group.attend(self.layout.index_of[layer], queries, mask, window)

    def attend_behind(
        self, layer: int, queries: Tensor, mask: Tensor | Literal["all"] | None, slots: int
    ) -> tuple[Tensor, Tensor]:
        """See `hasten.model.rows.SequenceState`."""
        group = self.groups[self.layout.group_of[layer]]
        return group.attend_behind(self.layout.index_of[layer], queries, mask, slots)

    def state(self, layer: int) -> State | None:
        """See `hasten.model.rows.SequenceState`."""
        return self.states.get(layer)

    def pending_states(self, layer: int) -> PendingStates | None:
        """See `hasten.model.rows.SequenceState`."""
        return self._left.get(layer)

    def leave(self, layer: int, states: PendingStates) -> None:
        """See `hasten.model.rows.SequenceState`."""
        self._left[layer] = states

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
        if count and self._left:
            self._latest = _Commit(self.length, self.states, list(rows), self._left)
            self.states = self._latest.at(self.length + count)
        for group in self.groups:
            group.commit(rows)
        self.length += count
        self._forget_pending()

    def withdraw(self, rows: int) -> None:
        """Take back the latest so many pending rows, as if their pass had been without them.

        Raises:
            ValueError: there are not so many.
            RollbackError: a recurrent layer has read them.
        """
        if not 0 <= rows <= self.pending:
            raise ValueError(f"cannot withdraw {rows} of {self.pending} pending rows")
        if self._left:
            raise RollbackError(f"cannot withdraw {rows} rows: layer {self._recurrent[0]} is recurrent")
        for group in self.groups:
            group.withdraw(rows)
        self.pending -= rows

    def crop(self, length: int) -> None:
        """Forget committed rows from `length` on, and all pending ones.

        Raises:
            ValueError: a length beyond what is committed.
            RollbackError: a recurrent layer would have to forget more than the latest commit, or what a group made of
                its slots cannot be undone.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop {self.length} slots to {length}")
        states = self.states
        if length < self.length and self._recurrent:
            latest = self._latest
            if latest is None or not latest.length <= length <= latest.length + len(latest.rows):
                raise RollbackError(
                    f"cannot crop {self.length} slots to {length}: layer {self._recurrent[0]} is recurrent, and goes "
                    "back to rows of the latest commit only; restore a snapshot and replay"
                )
            states = latest.at(length)
        self._crop(length)
        self.states = states

    @property
    def _recurrent(self) -> list[int]:
        return [index for index, layer in enumerate(self._cache.layers) if isinstance(layer.keeps, KeptState)]

    def _crop(self, length: int) -> None:
        self._forget_pending()
        for group in self.groups:
            group.crop(self.length - length)
        self.length = length

    def _forget_pending(self) -> None:
        self.pending = 0
        self._left = {}

    def evict(self, slots: Sequence[int]) -> None:
        """Forget committed rows with these (ascending) numbers, and all pending ones; what is behind them moves up.

        Without numbers nothing happens: pending rows stay, too. A method that keeps other slots in each group evicts
        by `GroupCache.evict`.

        Raises:
            ValueError: numbers out of range or not ascending.
            RollbackError: a recurrent layer would have to forget.
        """
        self._refuse_released()
        if not slots:
            return
        if slots[0] < 0 or slots[-1] >= self.length or any(a >= b for a, b in pairwise(slots)):
            raise ValueError(f"evicted slots {list(slots)} are not ascending numbers below {self.length}")
        if self._recurrent:
            raise RollbackError(f"cannot evict {len(slots)} slots: layer {self._recurrent[0]} is recurrent")
        for group in self.groups:
            group.evict(slots)
        self._forget_pending()
        self.length -= len(slots)

    def fork(self) -> SequenceCache:
        """A second sequence with the same committed rows."""
        self._refuse_released()
        child = SequenceCache(self._cache, self.layout, [group.fork() for group in self.groups])
        child.length, child.states = self.length, dict(self.states)
        return child

    def release(self) -> None:
        """Give everything back; the sequence is unusable afterwards. Releasing twice is harmless."""
        for group in self.groups:
            group.release()
        if self._holds and not self._released:
            self._cache.give(self._cache.state_bytes)
        self.length, self._released = 0, True
        self.states, self._latest = {}, None
        self._forget_pending()

    def trim(self) -> None:
        """Give back slots behind the last one, as far as that is possible."""
        self._refuse_released()
        self._forget_pending()
        for group in self.groups:
            group.trim()

    def nbytes(self) -> int:
        """Of all that it reads, what it shares with others included."""
        return sum((group.nbytes() for group in self.groups), self._cache.state_bytes if self._holds else 0)

    def snapshot(self) -> Snapshot:
        """The states of all recurrent layers at the present length, pending rows left out."""
        return Snapshot(self.length, dict(self.states))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot taken at this or a shorter length; rows after it must be replayed.

        Raises:
            ValueError: the snapshot is longer than the sequence.
            RollbackError: what a group made of its slots cannot be undone.
        """
        if snapshot.length > self.length:
            raise ValueError(f"the snapshot has {snapshot.length} slots, the sequence only {self.length}")
        self._crop(snapshot.length)
        self.states, self._latest = dict(snapshot.states), None

    def _hold(self) -> None:
        """Count the states before there are any: a step must not find that they do not fit."""
        self._cache.take(self._cache.state_bytes)
        self._holds = True

    def _refuse_released(self) -> None:
        if self._released:
            raise RuntimeError("the sequence was released")
