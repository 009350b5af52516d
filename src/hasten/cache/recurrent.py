"""States of recurrent layers behind each pending row, so that a commit can go back to any of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

State = tuple[Tensor, ...]
"""What a recurrent layer keeps of a sequence, of whatever shapes. Never written in place: forks share it."""


class RollbackError(RuntimeError):
    """Rows are to be forgotten of which something was made that cannot be undone."""


@dataclass(frozen=True)
class StatePerRow:
    """The state behind each pending row: any of them is there at once, for so many times the memory.

    Attributes:
        states: [pending, ...] each.
    """

    states: State

    def after(self, before: State | None, rows: Sequence[int]) -> State:
        """See `hasten.model.rows.PendingStates`."""
        return tuple(state.clone() for state in self.at(before, rows[-1]))

    def at(self, before: State | None, row: int) -> State:
        """The state behind one pending row, for those that follow it."""
        return tuple(state[row] for state in self.states)

    def extended(self, more: StatePerRow) -> StatePerRow:
        """With the states behind further rows."""
        return StatePerRow(tuple(torch.cat(pair) for pair in zip(self.states, more.states, strict=True)))


@dataclass(frozen=True)
class Replay:
    """What each pending row feeds the recurrence: the state is made again from those that are kept.

    Attributes:
        inputs: [pending, ...] each.
        parents: the pending row that each row follows, -1 for the committed ones: `hasten.model.rows.Span.parents`.
        update: (state before, or None, inputs of one row) to the state behind it.
    """

    inputs: State
    parents: list[int]
    update: Callable[[State | None, State], State]

    def after(self, before: State | None, rows: Sequence[int]) -> State:
        """See `hasten.model.rows.PendingStates`."""
        state = before
        for row in rows:
            state = self.update(state, tuple(each[row] for each in self.inputs))
        assert state is not None
        return state

    def at(self, before: State | None, row: int) -> State:
        """The state behind one pending row, for those that follow it."""
        path = []
        while row >= 0:
            path.append(row)
            row = self.parents[row]
        return self.after(before, path[::-1])

    def extended(self, more: Replay) -> Replay:
        """With the inputs of further rows."""
        inputs = tuple(torch.cat(pair) for pair in zip(self.inputs, more.inputs, strict=True))
        return Replay(inputs, self.parents + more.parents, self.update)
