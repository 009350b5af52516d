"""The best trees of ranks, against all of them."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.engine import ROOT
from hasten.methods.heads.tree import best_paths, drawn_up

TABLE = [[0.5, 0.3, 0.1], [0.6, 0.2], [0.7, 0.1, 0.05]]


def all_paths(table: list[list[float]]) -> dict[tuple[int, ...], float]:
    return {
        path: prod(table[level][rank] for level, rank in enumerate(path))
        for depth in range(1, len(table) + 1)
        for path in product(*(range(len(ranks)) for ranks in table[:depth]))
    }


@given(
    st.lists(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4).map(lambda r: sorted(r, reverse=True)), max_size=3),
    st.integers(0, 40),
)
def test_they_are_the_largest_products(table: list[list[float]], nodes: int) -> None:
    every = all_paths(table)
    found = best_paths(table, nodes)
    assert len(found) == min(nodes, len(every))
    assert [worth for worth, _ in found] == pytest.approx(sorted(every.values(), reverse=True)[: len(found)])
    known: set[tuple[int, ...]] = {()}
    for worth, path in found:
        assert worth == pytest.approx(every[path])
        assert path[:-1] in known
        known.add(path)


def test_what_cannot_be_is_no_node() -> None:
    assert [path for _, path in best_paths([[0.9, 0.0], [0.5, 0.0]], 10)] == [(0,), (0, 0)]


def test_a_draft_has_the_tokens_of_the_paths() -> None:
    draft = drawn_up(best_paths(TABLE, 5), [[10, 11, 12], [20, 21], [30, 31, 32]])
    spelled = [[draft.tokens[node] for node in draft.path(place)] for place in range(len(draft))]
    assert spelled == [[10], [10, 20], [11], [10, 20, 30], [11, 20]]
    assert draft.parents == [ROOT, 0, ROOT, 1, 2]
    assert draft.estimates == pytest.approx([0.5, 0.3, 0.3, 0.21, 0.18])
