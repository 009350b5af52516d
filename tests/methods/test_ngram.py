"""Prompt lookup: which occurrence is continued, how, and that the incremental index is the plain search."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from hasten import SamplingParams
from hasten.engine import Draft, Engine, Target
from hasten.methods.drafters.ngram import Ngram, NgramParameters
from hasten.model import OracleModel
from helpers import Replay

TARGET = Target(OracleModel(lambda history: None, 100))


def propose(tokens: list[int], budget: int = 64, **parameters: int) -> list[int]:
    drafter = Ngram(TARGET, NgramParameters(**parameters))
    draft = drafter.propose(SimpleNamespace(id=0, tokens=tokens), budget)
    assert draft == Draft.chain(draft.tokens)
    return draft.tokens


def by_search(tokens: list[int], length: int, minimum: int, maximum: int) -> list[int]:
    """The definition: the longest suffix that occurred before, where it occurred last; on through what is proposed."""
    for size in range(min(maximum, len(tokens)), minimum - 1, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[-size:]:
                known = list(tokens)
                for step in range(length):
                    known.append(known[start + size + step])
                return known[len(tokens) :]
    return []


def test_continues_as_before():
    assert propose([1, 2, 3, 4, 5, 9, 2, 3], length=3) == [4, 5, 9]
    assert propose([1, 2, 3, 4, 5, 6]) == []
    assert propose([1]) == []


def test_most_recent_occurrence():
    assert propose([2, 3, 7, 2, 3, 8, 2, 3], length=1) == [8]


def test_longest_match_first():
    assert propose([1, 2, 3, 7, 0, 2, 3, 8, 1, 2, 3], length=1) == [7]
    assert propose([1, 2, 3, 7, 0, 2, 3, 8, 1, 2, 3], length=1, maximum=2) == [8]


def test_shortest_match_allowed():
    tokens = [4, 7, 1, 2, 4]
    assert propose(tokens, length=2) == []
    assert propose(tokens, length=2, minimum=1) == [7, 1]


def test_periodic_continuation():
    assert propose([1, 2, 3, 1, 2, 3, 1, 2, 3], length=7) == [1, 2, 3, 1, 2, 3, 1]
    assert propose([9, 5, 5, 5], length=4) == [5, 5, 5, 5]


def test_budget():
    assert propose([1, 2, 3, 4, 1, 2], budget=1, length=10) == [3]
    assert propose([1, 2, 3, 4, 1, 2], budget=0) == []


small = st.integers(1, 4)


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=10),
    st.integers(1, 12),
    small,
    small,
)
def test_incremental_index_is_the_plain_search(steps, length, minimum, further):
    """Tokens arrive a few at a time, as they are accepted."""
    parameters = NgramParameters(length, minimum, minimum + further - 1)
    drafter = Ngram(TARGET, parameters)
    request = SimpleNamespace(id=7, tokens=[])
    for step in steps:
        request.tokens += step
        expected = by_search(request.tokens, length, parameters.minimum, parameters.maximum)
        assert drafter.propose(request, 64).tokens == expected


def test_requests_are_apart_and_forgotten():
    drafter = Ngram(TARGET, NgramParameters())
    one, other = (SimpleNamespace(id=index, tokens=[1, 2, 3 + index, 1, 2]) for index in range(2))
    drafter.propose(one, 9)
    drafter.propose(other, 9)
    one.tokens += [3, 1, 2]
    assert drafter.propose(one, 1).tokens == [3]
    assert drafter.propose(other, 1).tokens == [4]
    drafter.end(one)
    drafter.end(other)
    drafter.end(other)
    assert drafter._indices == {}


def test_pays_on_repetition(llm):
    """A text that was seen before costs a few steps."""
    asked = SamplingParams(max_tokens=30, ignore_eos=True)
    first = llm.generate([[5, 6, 7]], asked, "plain")[0]
    prompt = [5, 6, 7, *first.token_ids, 5, 6, 7]
    expected = llm.generate([prompt], asked, "plain")[0]
    got = llm.generate([prompt], asked, "ngram")[0]
    assert got.token_ids == expected.token_ids
    engine = Engine(llm.model)
    best = engine.add(prompt, asked, Replay([expected], 10))[0]
    for _ in engine.run():
        pass
    assert best.statistics.steps <= got.choices[0].steps <= expected.choices[0].steps
