"""What earlier requests showed, asked by the likeness of prompts: requests of one kind share their best drafter."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

REMEMBERED = 128
"""Requests, the latest."""
COMPARED = 256
"""Tokens at a prompt's end that its likeness is judged by."""
NEIGHBOURS = 8
"""Requests that an expectation is made from, the most alike."""
SHARPNESS = 3
"""Exponent of likeness: half as alike weighs an eighth."""
TRACE = 1e-4
"""Weight of a prompt that is not alike at all."""
FIRST_LENGTH = 128.0
"""Tokens of an answer, as long as no answer is known."""
LEAST_WEIGHT, MOST_WEIGHT = 0.5, 4.0
"""Drafts that an expectation is worth, from nothing alike to the very same tokens."""


@dataclass(frozen=True)
class Outcome:
    """How a drafter fared in a request.

    Attributes:
        gain: tokens per draft.
        trust: accepted tokens over promised ones.
    """

    gain: float
    trust: float


UNKNOWN = Outcome(3.0, 1.0)
"""What is expected of a drafter before it was ever asked."""


@dataclass(frozen=True)
class Expectation:
    """Of a new request.

    Attributes:
        length: tokens of its answer.
        outcomes: one for every drafter.
        weight: drafts that this is worth.
    """

    length: float
    outcomes: tuple[Outcome, ...]
    weight: float


@dataclass(frozen=True)
class _Memory:
    tokens: frozenset[int]
    length: int
    outcomes: tuple[Outcome | None, ...]


class Experience:
    """Lengths of answers and outcomes of drafters by prompt; likeness is the Jaccard index of the sets of tokens.

    Args:
        drafters: how many there are.
    """

    def __init__(self, drafters: int) -> None:
        self._drafters = drafters
        self._memories: deque[_Memory] = deque(maxlen=REMEMBERED)

    def remember(self, prompt: Sequence[int], length: int, outcomes: Sequence[Outcome | None]) -> None:
        """A request is over.

        Args:
            prompt: its tokens.
            length: of the answer.
            outcomes: per drafter; None for one that was not asked.
        """
        self._memories.append(_Memory(frozenset(prompt[-COMPARED:]), length, tuple(outcomes)))

    def expect(self, prompt: Sequence[int]) -> Expectation:
        """What to expect of a new request."""
        own = frozenset(prompt[-COMPARED:])
        scored = [(_likeness(own, memory.tokens), memory) for memory in self._memories]
        nearest = sorted(scored, key=lambda pair: -pair[0])[:NEIGHBOURS]
        if not nearest:
            return Expectation(FIRST_LENGTH, (UNKNOWN,) * self._drafters, LEAST_WEIGHT)
        weights = [likeness**SHARPNESS + TRACE for likeness, _ in nearest]
        length = sum(w * memory.length for w, (_, memory) in zip(weights, nearest, strict=True)) / sum(weights)
        outcomes = tuple(
            _mean(weights, [memory.outcomes[drafter] for _, memory in nearest]) for drafter in range(self._drafters)
        )
        return Expectation(length, outcomes, max(LEAST_WEIGHT, MOST_WEIGHT * nearest[0][0]))


def _likeness(one: frozenset[int], other: frozenset[int]) -> float:
    """Jaccard index: 1 for equal sets, 0 for disjoint ones."""
    shared = len(one & other)
    return shared / max(len(one) + len(other) - shared, 1)


def _mean(weights: Sequence[float], outcomes: Sequence[Outcome | None]) -> Outcome:
    """The weighted mean of those that are known."""
    known = [(weight, outcome) for weight, outcome in zip(weights, outcomes, strict=True) if outcome is not None]
    if not known:
        return UNKNOWN
    total = sum(weight for weight, _ in known)
    gain = sum(weight * outcome.gain for weight, outcome in known) / total
    return Outcome(gain, sum(weight * outcome.trust for weight, outcome in known) / total)
