"""SuffixDecoding by definition: every substring in a dictionary. What the index and the drafter are tested against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


class Counts:
    """Counts of all substrings of up to `depth` tokens, and what follows each, in the order it appeared."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.sequences: dict[int, list[int]] = {}
        self.count: dict[tuple[int, ...], int] = {}
        self.following: dict[tuple[int, ...], dict[int, None]] = {}
        self._next = 0

    def add(self) -> int:
        self._next += 1
        self.sequences[self._next - 1] = []
        return self._next - 1

    def extend(self, number: int, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.sequences[number].append(token)
            for string in self._ending(self.sequences[number]):
                self.count[string] = self.count.get(string, 0) + 1
                self.following.setdefault(string[:-1], {})[token] = None

    def remove(self, number: int) -> None:
        tokens = self.sequences.pop(number)
        for end in range(1, len(tokens) + 1):
            for string in self._ending(tokens[:end]):
                self.count[string] -= 1
                if self.count[string] == 0:
                    del self.count[string], self.following[string[:-1]][string[-1]]

    def _ending(self, tokens: list[int]) -> list[tuple[int, ...]]:
        return [tuple(tokens[-size:]) for size in range(1, min(self.depth, len(tokens)) + 1)]

    def next(self, string: tuple[int, ...]) -> list[tuple[int, int]]:
        """(count, token) of what follows; nothing beyond the depth."""
        if len(string) >= self.depth:
            return []
        return [(self.count[(*string, token)], token) for token in self.following.get(string, {})]


@dataclass
class Speculation:
    tokens: list[int]
    parents: list[int]
    probabilities: list[Fraction]
    match: int = 0

    @property
    def score(self) -> Fraction:
        return sum(self.probabilities, Fraction(0))


def speculate(
    counts: Counts,
    text: Sequence[int],
    length: int,
    factor: float = 1.0,
    offset: float = 0.0,
    minimum: Fraction = Fraction(1, 10),
    tree: bool = False,
) -> Speculation:
    """The best draft over all match lengths; the longer match among equals."""
    context = tuple(text[-counts.depth :])
    best = Speculation([], [], [])
    for match in range(1, len(context)):
        string = context[-match:]
        if string not in counts.count:
            break
        limit = max(0, min(length, math.floor(factor * match + offset + 1e-6)))
        grown = (grow_tree if tree else grow_chain)(counts, string, limit, minimum)
        if grown.tokens and grown.score >= best.score:
            grown.match = match
            best = grown
    return best


def grow_chain(counts: Counts, string: tuple[int, ...], limit: int, minimum: Fraction) -> Speculation:
    grown, probability = Speculation([], [], []), Fraction(1)
    while len(grown.tokens) < limit and counts.next(string):
        count, token = max(counts.next(string), key=lambda each: each[0])
        probability *= Fraction(count, counts.count[string])
        if probability < minimum:
            break
        grown.parents.append(len(grown.tokens) - 1)
        grown.tokens.append(token)
        grown.probabilities.append(probability)
        string = (*string, token)
    return grown


def grow_tree(counts: Counts, string: tuple[int, ...], limit: int, minimum: Fraction) -> Speculation:
    grown = Speculation([], [], [])
    open_paths: list[tuple[Fraction, tuple[int, ...], int]] = []

    def follow(probability: Fraction, string: tuple[int, ...], parent: int) -> None:
        for count, token in counts.next(string):
            further = probability * Fraction(count, counts.count[string])
            if further >= minimum:
                open_paths.append((further, (*string, token), parent))

    follow(Fraction(1), string, -1)
    while open_paths and len(grown.tokens) < limit:
        likeliest = max(open_paths, key=lambda path: path[0])
        open_paths.remove(likeliest)
        probability, string, parent = likeliest
        grown.tokens.append(string[-1])
        grown.parents.append(parent)
        grown.probabilities.append(probability)
        follow(probability, string, len(grown.tokens) - 1)
    return grown
