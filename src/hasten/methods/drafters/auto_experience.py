"""What earlier requests showed, asked by the likeness of prompts: requests of one kind share their best drafter."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields

REMEMBERED = 128
"""Requests, the latest, over all tenants."""
COMPARED = 256
"""Tokens at a prompt's end that its likeness is judged by."""
NEIGHBOURS = 8
"""Requests that an expectation is made from, the most alike."""
SHARPNESS = 3
"""Exponent of likeness: half as alike weighs an eighth."""
TRACE = 1e-4
"""Weight of a prompt that is not alike at all."""
LEAST_WEIGHT, MOST_WEIGHT = 1.0, 4.0
"""Drafts that an expectation is worth, from nothing alike to the very same tokens."""


@dataclass(frozen=True)
class Outcome:
    """How a drafter fared in a request.

    Attributes:
        gain: tokens per draft.
        trust: accepted tokens over promised ones.
        asks: how many drafts it made.
        profit: plain steps that a draft saved, less what it and its rows took.
    """

    gain: float
    trust: float
    asks: float
    profit: float = 0.0


UNKNOWN = Outcome(3.0, 1.0, 8.0)
"""What is expected of a drafter before it was ever asked."""


NAMES = tuple(field.name for field in fields(Outcome))


@dataclass(frozen=True)
class Expectation:
    """Of a new request.

    Attributes:
        outcomes: one for every drafter.
        weight: drafts that this is worth.
    """

    outcomes: tuple[Outcome, ...]
    weight: float


@dataclass(frozen=True)
class _Memory:
    tenant: str
    tokens: frozenset[int]
    outcomes: tuple[Outcome | None, ...]


class Experience:
    """Outcomes of drafters by prompt; likeness is the Jaccard index of the sets of tokens.

    What one tenant's prompts showed is not told to another.

    Args:
        drafters: how many there are.
    """

    def __init__(self, drafters: int) -> None:
        self._drafters = drafters
        self._memories: deque[_Memory] = deque(maxlen=REMEMBERED)

    def remember(self, tenant: str, prompt: Sequence[int], outcomes: Sequence[Outcome | None]) -> None:
        """A request is over.

        Args:
            tenant: whose it was.
            prompt: its tokens.
            outcomes: per drafter; None for one that was not asked.
        """
        self._memories.append(_Memory(tenant, frozenset(prompt[-COMPARED:]), tuple(outcomes)))

    def expect(self, tenant: str, prompt: Sequence[int]) -> Expectation:
        """What to expect of a tenant's new request."""
        own = frozenset(prompt[-COMPARED:])
        scored = [(_likeness(own, memory.tokens), memory) for memory in self._memories if memory.tenant == tenant]
        nearest = sorted(scored, key=lambda pair: -pair[0])[:NEIGHBOURS]
        if not nearest:
            return Expectation((UNKNOWN,) * self._drafters, LEAST_WEIGHT)
        weights = [likeness**SHARPNESS + TRACE for likeness, _ in nearest]
        outcomes = tuple(
            _mean(weights, [memory.outcomes[drafter] for _, memory in nearest]) for drafter in range(self._drafters)
        )
        return Expectation(outcomes, max(LEAST_WEIGHT, MOST_WEIGHT * nearest[0][0]))


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
    return Outcome(*(sum(w * getattr(outcome, name) for w, outcome in known) / total for name in NAMES))
