"""Prompt lookup: what followed the last few tokens the last time they occurred is proposed again.

Saxena 2023, "Prompt Lookup Decoding"; also LLMA (Yang et al. 2304.04487). No model, no training, no state beyond the
request. Exactness: lossless (a deterministic chain). Pays on text that repeats its context: summaries, edits, code,
retrieval; proposes nothing where nothing repeats.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from hasten.engine import Draft, Drafter, Request, Target, register
from hasten.engine.memory import table_growth
from hasten.errors import UserError


@dataclass(frozen=True)
class NgramParameters:
    """The longest suffix of `minimum` to `maximum` tokens that occurred before is looked up; `length` tokens follow.

    Raises:
        UserError: out of range.
    """

    length: int = 10
    minimum: int = 2
    maximum: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.length <= 64:
            raise UserError("ngram: length must be between 1 and 64")
        if not 1 <= self.minimum <= self.maximum <= 16:
            raise UserError("ngram: 1 <= minimum <= maximum <= 16 must hold")


@dataclass
class _Index:
    """Where each n-gram was last followed by something: its tokens to the position of the follower."""

    followers: dict[tuple[int, ...], int] = field(default_factory=dict)
    indexed: int = 0


@register(
    "ngram",
    family="drafters",
    exactness="lossless",
    paper="2304.04487",
    title="Prompt lookup: go on as the same n-gram did before",
    parameters=NgramParameters,
)
class Ngram(Drafter):
    """One incremental index per request: a lookup costs a few dictionary probes, whatever the context's length."""

    def __init__(self, target: Target, parameters: NgramParameters) -> None:
        self.parameters = parameters
        self._indices: dict[int, _Index] = {}
        # A key, and its number.
        self._entry = sys.getsizeof((0,) * parameters.maximum) + 32

    @property
    def memory_bytes(self) -> int:
        """Of the tables, estimated from their sizes."""
        return sum(
            sys.getsizeof(index.followers) + self._entry * len(index.followers) for index in self._indices.values()
        )

    def growth_bytes(self, requests: Sequence[Request], rows: int = 0) -> int:
        grown = 0
        for request in requests:
            index = self._indices.get(request.id)
            tokens = len(request.tokens) - (index.indexed if index is not None else 0)
            entries = tokens * (self.parameters.maximum - self.parameters.minimum + 1)
            grown += entries * self._entry + table_growth(None if index is None else index.followers, entries)
        return grown

    def propose(self, request: Request, budget: int) -> Draft:
        index = self._indices.setdefault(request.id, _Index())
        tokens = request.tokens
        self._extend(index, tokens)
        length = min(self.parameters.length, budget)
        for size in range(min(self.parameters.maximum, len(tokens)), self.parameters.minimum - 1, -1):
            follower = index.followers.get(tuple(tokens[-size:]))
            if follower is not None:
                return Draft.chain(_continue(tokens, follower, length))
        return Draft()

    def end(self, request: Request) -> None:
        self._indices.pop(request.id, None)

    def _extend(self, index: _Index, tokens: list[int]) -> None:
        """Index the n-grams that end before each new token; the context's own end has no follower yet."""
        for position in range(max(index.indexed, self.parameters.minimum), len(tokens)):
            for size in range(self.parameters.minimum, min(self.parameters.maximum, position) + 1):
                index.followers[tuple(tokens[position - size : position])] = position
        index.indexed = len(tokens)


def _continue(tokens: list[int], follower: int, length: int) -> list[int]:
    """`length` tokens from `follower` on; where the context ends, the repetition goes on through what it proposed."""
    period = len(tokens) - follower
    return [tokens[follower + step % period] for step in range(length)]
