"""Which parts of a long prompt bear on its question: BM25 over tokens, or a sentence encoder where one is installed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from math import log
from typing import Any, Protocol

from hasten.errors import UserError

SATURATION, LENGTH = 1.2, 0.75
"""BM25's k1 and b: how soon repeating a term adds nothing more, and how much long chunks are held back."""


class Retriever(Protocol):
    """Tells how much each chunk has to do with a query."""

    def scores(self, chunks: Sequence[Sequence[int]], query: Sequence[int]) -> list[float]:
        """One number per chunk, larger where it is closer to the query.

        Args:
            chunks, query: token ids.
        """


class BM25:
    """Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009; terms are tokens, in any language.

    The inverse document frequency is log(1 + (chunks - n + 0.5) / (n + 0.5)), which is never negative.
    """

    def scores(self, chunks: Sequence[Sequence[int]], query: Sequence[int]) -> list[float]:
        counts = [Counter(chunk) for chunk in chunks]
        having = Counter(term for each in counts for term in each)
        weights = {
            term: log(1 + (len(chunks) - having[term] + 0.5) / (having[term] + 0.5))
            for term in set(query) & set(having)
        }
        usual = sum(map(len, chunks)) / max(1, len(chunks))
        return [
            sum(weight * _saturated(each[term], len(chunk) / usual) for term, weight in weights.items())
            for each, chunk in zip(counts, chunks, strict=True)
        ]


def _saturated(count: int, length: float) -> float:
    """A term's count in a chunk, `length` times as long as usual, as BM25 counts it."""
    return count * (SATURATION + 1) / (count + SATURATION * (1 - LENGTH + LENGTH * length))


class Encoder:
    """Cosine of embeddings by the package sentence-transformers.

    Args:
        name: of the model, as that package finds it.
        tokenizer: of the target, for texts.

    Raises:
        UserError: the package is not installed, the model cannot be loaded, or the target has no tokenizer.
    """

    def __init__(self, name: str, tokenizer: Any) -> None:
        if tokenizer is None:
            raise UserError("rapid: an encoder reads text, and this model has no tokenizer: leave out encoder")
        self._model, self._tokenizer = _encoder(name), tokenizer

    def scores(self, chunks: Sequence[Sequence[int]], query: Sequence[int]) -> list[float]:
        texts = [self._tokenizer.decode(list(part)) for part in (*chunks, query)]
        vectors = self._model.encode(texts, normalize_embeddings=True)
        return [float(vector @ vectors[-1]) for vector in vectors[:-1]]


@cache
def _encoder(name: str) -> Any:
    try:
        return import_module("sentence_transformers").SentenceTransformer(name)
    except ImportError:
        raise UserError("rapid: encoder needs the package sentence-transformers: pip install it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"rapid: cannot load the encoder {name!r}: {error}") from None


def shortened(tokens: Sequence[int], retriever: Retriever, most: int, chunk: int, head: int, tail: int) -> list[int]:
    """A prompt without what has little to do with its question, which is taken to stand at one of its ends.

    Args:
        tokens: ids; negative ones stand for embeddings, and are no terms.
        most: tokens that may be left.
        chunk: tokens of each part that is kept or left out.
        head, tail: tokens at both ends that are kept whatever they say.

    Returns:
        What is left, in its order: chunks by relevance would tell another story.
    """
    if len(tokens) <= most:
        return list(tokens)
    start, stop = head, len(tokens) - tail
    chunks = [tokens[at : min(at + chunk, stop)] for at in range(start, stop, chunk)]
    query = [token for token in (*tokens[:start], *tokens[stop:]) if token >= 0]
    scores = retriever.scores([[token for token in each if token >= 0] for each in chunks], query)
    # Where chunks are alike, the later ones: text goes on from there.
    ranked = sorted(range(len(chunks)), key=lambda number: (scores[number], number), reverse=True)
    kept = sorted(ranked[: max(0, (most - head - tail) // chunk)])
    return [*tokens[:start], *(token for number in kept for token in chunks[number]), *tokens[stop:]]
