"""The ten list operations of ParallelBench, on items of any kind: names, words or token ids.

A problem knows its valid answers. Theory and oracle count them, and the tasks draw and grade with them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Generic, TypeVar

from hasten.errors import require

T = TypeVar("T", bound=Hashable)

OPERATIONS = (
    "copy",
    "reverse",
    "sort",
    "insert_index",
    "insert_random",
    "remove_index",
    "remove_random",
    "replace_index",
    "replace_random",
    "shuffle",
)
WITH_WORD = {name for name in OPERATIONS if name.startswith(("insert", "replace"))}
WITH_INDEX = {name for name in OPERATIONS if name.endswith("index")}
SEVERAL_ANSWERS = {"insert_random", "remove_random", "replace_random", "shuffle"}


@dataclass(frozen=True)
class ListProblem(Generic[T]):
    """One operation on one list.

    Args:
        operation: one of `OPERATIONS`.
        items: the list, at least two items, all different.
        word: what is inserted or put in place of an item; not in the list.
        index: where, counted from 0.
        key: what `sort` compares, by default the items themselves.

    Raises:
        UserError: the operation is unknown, or its arguments are missing, superfluous or out of range.
    """

    operation: str
    items: tuple[T, ...]
    word: T | None = None
    index: int | None = None
    key: Callable[[T], Any] | None = None

    def __post_init__(self) -> None:
        places = len(self.items) + (self.operation == "insert_index")
        checks = [
            (self.operation in OPERATIONS, f"choose one of the operations {', '.join(OPERATIONS)}"),
            (len(set(self.items)) == len(self.items) > 1, "the list needs at least two items, all different"),
            ((self.word is not None) == (self.operation in WITH_WORD), "only insert and replace take a word"),
            (self.word not in self.items, "the word must not be in the list"),
            ((self.index is not None) == (self.operation in WITH_INDEX), "only operations at an index take an index"),
            (self.index is None or 0 <= self.index < places, f"the index must be from 0 to {places - 1}"),
        ]
        require(checks, f"list operation {self.operation!r}")

    @property
    def length(self) -> int:
        """The number of items of an answer."""
        return len(self.items) + {"insert": 1, "remove": -1}.get(self.operation.partition("_")[0], 0)

    def answers(self) -> list[tuple[T, ...]]:
        """All valid answers, each once and equally likely: n! for `shuffle` (the input is one of them), else
        at most n + 1."""
        kind, _, where = self.operation.partition("_")
        if kind == "shuffle":
            return list(permutations(self.items))
        if kind == "copy":
            return [self.items]
        if kind == "reverse":
            return [self.items[::-1]]
        if kind == "sort":
            return [tuple(sorted(self.items, key=self.key))]  # type: ignore[type-var,arg-type]
        if where == "index":
            assert self.index is not None  # checked when the problem was made
            return [self.changed_at(self.index)]
        return [self.changed_at(place) for place in range(len(self.items) + (kind == "insert"))]

    def changed_at(self, place: int) -> tuple[T, ...]:
        """The list after inserting, removing or replacing at that place."""
        kind = self.operation.partition("_")[0]
        new = () if self.word is None else (self.word,)
        return (*self.items[:place], *new, *self.items[place + (kind != "insert") :])

    def draw(self, rng: random.Random) -> tuple[T, ...]:
        """One of the valid answers, evenly."""
        if self.operation == "shuffle":
            return tuple(rng.sample(self.items, len(self.items)))
        return rng.choice(self.answers())

    def accepts(self, answer: Sequence[T]) -> bool:
        """Whether the answer is one of the valid ones."""
        if self.operation == "shuffle":
            return len(answer) == len(self.items) and set(answer) == set(self.items)
        return tuple(answer) in self.answers()
