"""Waiting line: the ten list operations, on names as the paper has them and on single-token words.

Two things differ from the paper. The paper asks to sort by last name, while its labels and its example sort by
first name: here the label is what the question asks for. And the paper never says that an index counts from 0.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..words import FIRST_NAMES, LAST_NAMES
from .base import BenchTask, Question
from .operations import OPERATIONS, WITH_INDEX, WITH_WORD, ListProblem

SIZES = (3, 4, 5, 6)
PER_SIZE = 25

REQUESTS = {
    "copy": "Copy the list",
    "reverse": "Reverse the list",
    "sort": "Sort the list",
    "insert_index": "Insert {word} at index {index}, counted from 0, in the list",
    "insert_random": "Insert {word} at a random place in the list",
    "remove_index": "Remove the item at index {index}, counted from 0, from the list",
    "remove_random": "Remove one random item from the list",
    "replace_index": "Replace the item at index {index}, counted from 0, with {word} in the list",
    "replace_random": "Replace one random item with {word} in the list",
    "shuffle": "Put the items in another random order in the list",
}


def last_name(name: str) -> tuple[str, str]:
    """What names are sorted by."""
    first, _, last = name.partition(" ")
    return last, first


class Items(ABC):
    """Where the items of a list come from, and how a list is written."""

    order: ClassVar[str]  # how `sort` says what it sorts by
    examples: ClassVar[bool]  # whether a question is preceded by an example

    @abstractmethod
    def draw(self, rng: random.Random, count: int) -> list[str]:
        """Different items."""

    @abstractmethod
    def write(self, items: Sequence[str]) -> str: ...

    @abstractmethod
    def read(self, text: str, strict: bool) -> list[str] | None:
        """The items of a list, or None if it is not written as asked."""

    def problem(self, operation: str, items: list[str], word: str | None, index: int | None) -> ListProblem[str]:
        return ListProblem(operation, tuple(items), word, index)


@dataclass(frozen=True)
class Names(Items):
    """Names such as Ann Lee, written ["Ann Lee", "Ben King"]. No two of a list share a first or last name."""

    order = "by last name"
    examples = True

    def draw(self, rng: random.Random, count: int) -> list[str]:
        pairs = zip(rng.sample(FIRST_NAMES, count), rng.sample(LAST_NAMES, count), strict=True)
        return [" ".join(pair) for pair in pairs]

    def write(self, items: Sequence[str]) -> str:
        return "[" + ", ".join(f'"{item}"' for item in items) + "]"

    def read(self, text: str, strict: bool) -> list[str] | None:
        """Lenient: what stands behind the last "[", if any, up to the next "]", at commas, without quotes."""
        if not strict:
            inside = text.rpartition("[")[2].partition("]")[0]
            return [item.strip(" \t\r\n\"'") for item in inside.split(",")]
        items = [item[1:-1] for item in text.strip()[1:-1].split(", ")]
        return items if self.write(items) == text.strip() else None

    def problem(self, operation: str, items: list[str], word: str | None, index: int | None) -> ListProblem[str]:
        return ListProblem(operation, tuple(items), word, index, key=last_name)


@dataclass(frozen=True)
class Words(Items):
    """Words of a given vocabulary, separated by a space alone, so that an item with its space may be one token."""

    vocabulary: tuple[str, ...]
    order = "alphabetically"
    examples = False

    def draw(self, rng: random.Random, count: int) -> list[str]:
        return rng.sample(self.vocabulary, count)

    def write(self, items: Sequence[str]) -> str:
        return " ".join(items)

    def read(self, text: str, strict: bool) -> list[str] | None:
        """Lenient: any white space separates, and commas do not matter."""
        if not strict:
            return text.replace(",", " ").split()
        items = text.split()
        return items if self.write(items) == text.strip() else None


@dataclass(frozen=True)
class ListQuestion(Question):
    """A list problem in words. `shuffle` is graded as in the paper: any order but that of the question."""

    problem: ListProblem[str]
    kind: Items

    def right(self, items: Sequence[str]) -> bool:
        unchanged = self.problem.operation == "shuffle" and tuple(items) == self.problem.items
        return self.problem.accepts(items) and not unchanged

    def grade(self, text: str, strict: bool = False) -> float:
        items = self.kind.read(text, strict)
        return float(items is not None and self.right(items))

    def draw(self, rng: random.Random) -> str:
        return draw_answer(rng, self.problem, self.kind)


def draw_answer(rng: random.Random, problem: ListProblem[str], kind: Items) -> str:
    """A valid answer as text; for `shuffle` not the input."""
    items = problem.draw(rng)
    while problem.operation == "shuffle" and items == problem.items:
        items = problem.draw(rng)
    return kind.write(items)


@dataclass(frozen=True)
class ListTask(BenchTask):
    """One operation on lists of one kind of items; a size is the length of the list."""

    operation: str
    kind: Items

    def ask(self, rng: random.Random, size: int) -> ListQuestion:
        word, *items = self.kind.draw(rng, size + 1)
        index = rng.randrange(size + (self.operation == "insert_index"))
        problem = self.kind.problem(
            self.operation,
            items,
            word if self.operation in WITH_WORD else None,
            index if self.operation in WITH_INDEX else None,
        )
        request = REQUESTS[self.operation].format(word=word, index=index)
        if self.operation == "sort":
            request = f"{request} {self.kind.order}"
        prompt = f"{request}: {self.kind.write(items)}"
        if self.kind.examples:
            prompt += "\nWrite only the final list."
        return ListQuestion(self.name, prompt, draw_answer(rng, problem, self.kind), problem, self.kind)

    def example_size(self, rng: random.Random, size: int) -> int | None:
        """Another length than the question's: what is shown is the operation, not the length."""
        return rng.choice((size - 1, size + 1)) if self.kind.examples else None


def name_tasks(sizes: tuple[int, ...] = SIZES, per_size: int = PER_SIZE, suffix: str = "") -> dict[str, BenchTask]:
    """The ten operations on names, by name."""
    kind = Names()
    return {name + suffix: ListTask(name + suffix, sizes, per_size, name, kind) for name in OPERATIONS}


def word_tasks(
    vocabulary: Sequence[str], sizes: tuple[int, ...] = SIZES, per_size: int = PER_SIZE
) -> dict[str, BenchTask]:
    """The ten operations on the caller's words, by name, for small models: an item is one token if each word,
    with a space before it, is one of the tokenizer's."""
    kind = Words(tuple(vocabulary))
    return {name: ListTask(name, sizes, per_size, name, kind) for name in OPERATIONS}
