"""The best trees of ranks, against all of them."""

from __future__ import annotations

import random
from functools import cache
from itertools import combinations, product
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.engine import ROOT
from hasten.methods.heads.tree import Expansion, Paths, best_paths, drawn_up, static_paths

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


def expected(paths: Paths) -> float:
    """Tokens of a step, the target's own included."""
    return 1 + sum(probability for probability, _ in paths)


UNORDERED = [[0.2, 0.5, 0.1], [0.1, 0.3], [0.6, 0.05, 0.2]]
"""Ranks that were right by chance more often than better ones."""


@pytest.mark.parametrize("table", [TABLE, UNORDERED])
@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5])
def test_no_other_tree_of_a_size_promises_more(table: list[list[float]], nodes: int) -> None:
    every = all_paths(table)
    # What is possible at all: each node below its parent.
    trees = (set(tree) for tree in combinations(every, nodes))
    closed = (tree for tree in trees if all(len(path) == 1 or path[:-1] in tree for path in tree))
    best = max(sum(every[path] for path in tree) for tree in closed)
    assert expected(static_paths(table, nodes)) == pytest.approx(1 + best)


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("nodes", [1, 3, 8, 13])
def test_sequoias_dynamic_programme_finds_nothing_better(depth: int, nodes: int) -> None:
    """Section 3.1: of m nodes, the last child takes y, and those before it the rest; the root is one of them."""
    ranks = [0.55, 0.2, 0.1, 0.04]

    @cache
    def best(size: int, levels: int, children: int) -> float:
        if children == 0:
            return 1.0 if size == 1 else -1e9
        if size < 2 or levels == 0:
            return -1e9
        below = [(y, max(best(y, levels - 1, b) for b in range(len(ranks) + 1))) for y in range(1, size)]
        return max(best(size - y, levels, children - 1) + ranks[children - 1] * worth for y, worth in below)

    optimum = max(best(nodes + 1, depth, children) for children in range(len(ranks) + 1))
    if depth == 1 and nodes > len(ranks):
        assert optimum < 0 and len(static_paths([ranks], nodes)) == len(ranks)
    else:
        assert expected(static_paths([ranks] * depth, nodes)) == pytest.approx(optimum)


def test_a_simulation_accepts_as_many_tokens() -> None:
    """At every level one of the ranks is right, or none: then the step ends."""
    draw, paths = random.Random(0), static_paths(UNORDERED, 6)
    tree, total, steps = {path for _, path in paths}, 0, 40_000
    for _ in range(steps):
        path: tuple[int, ...] = ()
        for ranks in UNORDERED:
            (rank,) = draw.choices([*range(len(ranks)), -1], [*ranks, 1 - sum(ranks)])
            if (*path, rank) not in tree:
                break
            path = (*path, rank)
        total += 1 + len(path)
    assert total / steps == pytest.approx(expected(paths), rel=0.01)


def test_a_static_tree_names_the_ranks_as_they_were_measured() -> None:
    assert [path for _, path in static_paths(UNORDERED, 4)] == [(1,), (0,), (1, 1), (2,)]


@given(
    st.lists(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4).map(lambda r: sorted(r, reverse=True)), max_size=3),
    st.integers(1, 20),
)
def test_grown_by_levels_a_tree_is_the_best_of_all(table: list[list[float]], nodes: int) -> None:
    tree = Expansion(nodes)
    level = [ROOT]
    for ranks in table:
        for node in level:
            tree.add(node, enumerate(ranks))
        level = tree.frontier(nodes)
    draft, expected = tree.best(), sorted(all_paths(table).values(), reverse=True)[:nodes]
    assert sorted(draft.estimates, reverse=True) == pytest.approx(expected)
    assert all(parent < node for node, parent in enumerate(draft.parents))


def test_what_is_hardly_likely_does_not_grow() -> None:
    tree = Expansion(4)
    tree.add(ROOT, [(5, 0.2), (6, 0.1), (7, 0.0)])
    assert len(tree.all) == 2 and tree.frontier(4, least=0.4) == []
    tree = Expansion(4)
    tree.add(ROOT, [(5, 0.2), (6, 0.1)])
    assert tree.frontier(1, least=0.2) == [0]
