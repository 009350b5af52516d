"""Operations on lists of words.

Items are separated by a space alone, so that an item is one token in the prompt and in the answer. Where a
repeated word would make it ambiguous what follows it, the items are distinct.
"""

from __future__ import annotations

import random

from .base import Example, Task, pick_size, register
from .words import ALL_WORDS, LIST_WORDS


class ListTask(Task):
    category = "lists"

    def ask(self, request: str, items: list[str], answer: list[str]) -> Example:
        return self.example(f"{request}: {' '.join(items)}", " ".join(answer), items=tuple(items))


def with_repeats(rng: random.Random, size: int) -> tuple[str, str, list[str]]:
    """A word, another that is not in the list, and a list with the first one in it up to three times."""
    times = rng.randint(1, min(3, size - 1))
    word, absent, *items = rng.sample(ALL_WORDS, size - times + 2)
    for _ in range(times):
        items.insert(rng.randint(0, len(items)), word)
    return word, absent, items


@register
class Copy(ListTask):
    name = "copy"
    title = "Copy a list of words"

    def generate(self, rng: random.Random, difficulty: float) -> Example:
        items = rng.choices(ALL_WORDS, k=pick_size(rng, 3, 200, difficulty))
        return self.ask("Copy the list", items, items)


@register
class Reverse(ListTask):
    name = "reverse"
    title = "Reverse a list of words"

    def generate(self, rng: random.Random, difficulty: float) -> Example:
        items = rng.sample(LIST_WORDS, pick_size(rng, 3, 60, difficulty))
        return self.ask("Reverse the list", items, items[::-1])


@register
class Sort(ListTask):
    name = "sort"
    title = "Sort words alphabetically"

    def generate(self, rng: random.Random, difficulty: float) -> Example:
        items = rng.sample(LIST_WORDS, pick_size(rng, 3, 24, difficulty))
        return self.ask("Sort the list alphabetically", items, sorted(items))


@register
class Insert(ListTask):
    name = "insert"
    title = "Insert a word into a list after another"

    def generate(self, rng: random.Random, difficulty: float) -> Example:
        new, *items = rng.sample(ALL_WORDS, pick_size(rng, 3, 60, difficulty) + 1)
        place = rng.randrange(len(items))
        answer = [*items[: place + 1], new, *items[place + 1 :]]
        return self.ask(f"Insert {new} after {items[place]} in the list", items, answer)


@register
class Remove(ListTask):
    name = "remove"
    title = "Remove every occurrence of a word from a list"

    def generate(self, rng: random.Random, difficulty: float) -> Example:
        word, _, items = with_repeats(rng, pick_size(rng, 3, 100, difficulty))
        return self.ask(f"Remove {word} from the list", items, [item for item in items if item != word])


@register
class Replace(ListTask):
    name = "replace"
    title = "Replace every occurrence of a word in a list"

    def generate(self, rng: random.Random, difficulty: float) -> Example:
        word, new, items = with_repeats(rng, pick_size(rng, 3, 100, difficulty))
        answer = [new if item == word else item for item in items]
        return self.ask(f"Replace {word} by {new} in the list", items, answer)


@register
class Shuffle(ListTask):
    name = "shuffle"
    title = "Write a list in another order; any other order is right"

    def generate(self, rng: random.Random, difficulty: float) -> Example:
        items = rng.sample(LIST_WORDS, pick_size(rng, 3, 40, difficulty))
        answer = items
        while answer == items:
            answer = rng.sample(items, len(items))
        return self.ask("Shuffle the list", items, answer)

    def grade(self, example: Example, output: str) -> bool:
        items, given = list(example.meta["items"]), output.split()
        return given != items and sorted(given) == sorted(items)
