"""Retrieval: BM25 by hand, chunks, and what is left of a prompt."""

from __future__ import annotations

import sys
from math import log
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from hasten.errors import UserError
from hasten.methods.drafters.retrieval import BM25, SIMILAR, SentenceEncoder, Shortening

HEAD, NEEDLE, TAIL = [1, 2], [50, 51, 52, 53], [90, 51, 91]
FILLER = list(range(10, 40))


def never(token: int) -> bool:
    return False


def test_bm25_is_the_formula():
    chunks, query = [[5, 5, 6], [6, 7], [8, 8, 8, 8]], [5, 8, 9, 5]
    mean = 3.0

    def part(count: int, found: int, length: int) -> float:
        inverse = log(1 + (3 - found + 0.5) / (found + 0.5))
        return inverse * count * 2.5 / (count + 1.5 * (0.25 + 0.75 * length / mean))

    assert BM25().scores(chunks, query) == pytest.approx([part(2, 1, 3), 0.0, part(4, 1, 4)])
    assert BM25().scores([], query) == []


def test_what_the_end_asks_about_stays_in_its_place():
    prompt = [*HEAD, *FILLER, *NEEDLE, *FILLER[::-1], *TAIL]
    shortening = Shortening(head=2, tail=3, chunk=4, least=8, share=0.0)
    short = shortening.shorten(prompt, BM25(), never)
    assert short[:2] == HEAD and short[-3:] == TAIL
    assert 51 in short[2:-3] and len(short) <= 2 + 8 + 3
    places = [prompt.index(token) for token in short[2:-3]]
    assert places == sorted(places)


def test_a_short_prompt_stays_as_it_is():
    shortening = Shortening(head=2, tail=3, chunk=4, least=30, share=0.0)
    prompt = [*HEAD, *FILLER, *TAIL]
    assert shortening.shorten(prompt, BM25(), never) == prompt
    assert shortening.shorten([1], BM25(), never) == [1]


def test_without_anything_alike_the_middle_goes():
    shortening = Shortening(head=2, tail=3, chunk=4, least=8, share=0.0)
    assert shortening.shorten([*HEAD, *FILLER, 90, 91, 92], BM25(), never) == [*HEAD, 90, 91, 92]


def test_the_share_counts_where_it_is_more():
    prompt = [1, *[7] * 100, 7]
    shortening = Shortening(head=1, tail=1, chunk=4, least=0, share=0.5)
    assert 0.5 - 4 / 102 <= len(shortening.shorten(prompt, BM25(), never)) / 102 <= 0.5 + 2 / 102


def test_chunks_end_with_a_paragraph_where_one_is_near():
    seen: list[list[int]] = []

    class Spy:
        def scores(self, chunks, query):
            seen.extend(list(chunk) for chunk in chunks)
            return [0.0 for _ in chunks]

    middle = [*range(10, 17), 3, *range(20, 41)]
    Shortening(1, 1, 8, 0, 0.0).shorten([1, *middle, 2], Spy(), lambda token: token in (3, 26))
    assert [token for chunk in seen for token in chunk] == middle
    assert [chunk[-1] for chunk in seen] == [3, 26, 34, 40]


def test_an_encoder_scores_by_cosine(monkeypatch):
    package = ModuleType("sentence_transformers")
    table = {"a": [1.0, 0.0], "b": [0.6, 0.8], "q": [1.0, 0.0]}

    def encode(texts, normalize_embeddings):
        assert normalize_embeddings
        return np.array([table[text] for text in texts])

    package.SentenceTransformer = lambda name, device: SimpleNamespace(encode=encode)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    encoder = SentenceEncoder("some", lambda ids: "abq"[ids[0]])
    assert encoder.scores([[0], [1]], [2]) == pytest.approx([1 - SIMILAR, 0.6 - SIMILAR])


def test_an_encoder_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match="pip install sentence-transformers"):
        SentenceEncoder("some", str)
