"""Which parts of a long prompt say something about its end: chunks, and retrievers that score them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import Any, Protocol

from hasten.errors import UserError

SATURATION, LENGTH_NORM = 1.5, 0.75
"""k1 and b of BM25."""
SIMILAR = 0.3
"""Cosine of a chunk that is kept where an encoder scores."""


class Retriever(Protocol):
    """Scores chunks for a query; what says nothing about it has a score of at most 0."""

    def scores(self, chunks: Sequence[Sequence[int]], query: Sequence[int]) -> list[float]:
        """One per chunk; both are token ids."""


class BM25:
    """Okapi BM25 over token ids (Robertson and Zaragoza 2009), with the inverse frequency that is never negative."""

    def scores(self, chunks: Sequence[Sequence[int]], query: Sequence[int]) -> list[float]:
        counts = [Counter(chunk) for chunk in chunks]
        mean = sum(map(len, chunks)) / max(1, len(chunks))
        found = Counter(token for count in counts for token in count)
        weight = {
            token: log(1 + (len(chunks) - found[token] + 0.5) / (found[token] + 0.5)) for token in dict.fromkeys(query)
        }

        def score(chunk: Sequence[int], count: Counter[int]) -> float:
            norm = SATURATION * (1 - LENGTH_NORM + LENGTH_NORM * len(chunk) / mean)
            return sum(
                worth * count[token] * (SATURATION + 1) / (count[token] + norm)
                for token, worth in weight.items()
                if token in count
            )

        return [score(chunk, count) for chunk, count in zip(chunks, counts, strict=True)]


class SentenceEncoder:
    """Cosine of sentence embeddings, less the one that is similar enough.

    Args:
        name: a model of the sentence-transformers package: a folder or hub id.
        decode: token ids to text.

    Raises:
        UserError: the package or the model is not there.
    """

    def __init__(self, name: str, decode: Callable[[Sequence[int]], str]) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise UserError(
                "rapid: pip install sentence-transformers to retrieve by an encoder, or use bm25"
            ) from error
        try:
            self._model: Any = SentenceTransformer(name, device="cpu")
        except (OSError, ValueError) as error:
            raise UserError(f"rapid: cannot load the sentence encoder {name!r}: {error}") from error
        self._decode = decode

    def scores(self, chunks: Sequence[Sequence[int]], query: Sequence[int]) -> list[float]:
        texts = [self._decode(chunk) for chunk in (*chunks, query)]
        vectors = self._model.encode(texts, normalize_embeddings=True)
        return [float(vector @ vectors[-1]) - SIMILAR for vector in vectors[:-1]]


@dataclass(frozen=True)
class Shortening:
    """How a prompt is shortened: its head, the chunks of its middle that its tail is about, and its tail.

    Attributes:
        head: tokens that stay at the beginning: what the model was told.
        tail: tokens that stay at the end: the query.
        chunk: tokens of a chunk.
        least: tokens of chunks, at least.
        share: of the prompt, if that is more.
    """

    head: int
    tail: int
    chunk: int
    least: int
    share: float

    def shorten(self, prompt: Sequence[int], retriever: Retriever, ends: Callable[[int], bool]) -> list[int]:
        """What is left of a prompt, in its own order.

        Args:
            prompt: token ids.
            ends: whether a paragraph ends with a token; chunks end there where that is near.
        """
        stop = max(self.head, len(prompt) - self.tail)
        budget = max(self.least, round(self.share * len(prompt)))
        if stop - self.head <= budget:
            return list(prompt)
        chunks = self._chunks(prompt[self.head : stop], ends)
        scores = retriever.scores(chunks, prompt[stop:])
        kept, left = set[int](), budget
        for number in sorted(range(len(chunks)), key=lambda number: (-scores[number], number)):
            if scores[number] > 0 and len(chunks[number]) <= left:
                kept.add(number)
                left -= len(chunks[number])
        middle = [token for number in sorted(kept) for token in chunks[number]]
        return [*prompt[: self.head], *middle, *prompt[stop:]]

    def _chunks(self, tokens: Sequence[int], ends: Callable[[int], bool]) -> list[Sequence[int]]:
        """All tokens, in pieces of at most `chunk`; the last quarter of a piece may be left to the next one."""
        chunks = []
        start = 0
        while start < len(tokens):
            stop = min(start + self.chunk, len(tokens))
            if stop < len(tokens):
                near = range(stop, max(start + 1, stop - self.chunk // 4), -1)
                stop = next((place for place in near if ends(tokens[place - 1])), stop)
            chunks.append(tokens[start:stop])
            start = stop
        return chunks
