"""Rows for guesses and for prompts, against all ways to share them out."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.engine import ROOT
from hasten.methods.heads.allotment import allot, gains

GAINS = [0.6, 0.3, 0.1]
CHAIN = [ROOT, 0, 1]


def free(rows: int) -> float:
    return 0.0


def linear(each: float):
    return lambda rows: each * (rows - 1)


def worth(probabilities, parents, nodes, prompts, each=0.0) -> float:
    """What some rows bring, less what they cost, by the definition: prompts pay where the step ends."""
    ends = {ROOT: 1.0} | {node: probabilities[node] for node in nodes}
    for node in nodes:
        ends[parents[node]] -= probabilities[node]
    later = sum(ends[node] * sum(GAINS[:count]) for node, count in zip([ROOT, *nodes], prompts, strict=True))
    return sum(probabilities[node] for node in nodes) + later - each * (len(nodes) + sum(prompts))


@pytest.mark.parametrize("each", [0.05, 0.12, 0.25])
def test_prompts_of_a_tree_are_the_best_ones(each: float):
    """Of all ways to put 0 to 3 prompts behind each of what is kept."""
    probabilities, parents = [0.7, 0.4, 0.2, 0.1], [ROOT, 0, ROOT, 1]
    found = allot(probabilities, parents, GAINS, linear(each), 60)
    every = product(range(4), repeat=len(found.nodes) + 1)
    best = max(worth(probabilities, parents, found.nodes, prompts, each) for prompts in every)
    assert worth(probabilities, parents, found.nodes, found.prompts, each) == pytest.approx(best)


def test_where_rows_cost_nothing_there_are_as_many_as_may_be():
    assert allot([0.5, 0.25, 0.1], CHAIN, GAINS, free, 60).prompts == [3, 3, 3, 3]
    assert allot([0.5, 0.25, 0.1], CHAIN, GAINS, free, 1).nodes == []


def test_a_likely_end_gets_prompts_first():
    # Ends: the root 0.1, the first node 0.8, the second 0.1.
    found = allot([0.9, 0.1], [ROOT, 0], GAINS, linear(0.07), 60)
    assert found.nodes == [0, 1] and found.prompts == [0, 3, 0]


def test_where_nothing_pays_there_is_nothing():
    found = allot([0.5, 0.25], [ROOT, 0], GAINS, linear(1.0), 60)
    assert found.nodes == [] and found.prompts == [0]


def test_an_ensemble_costs_a_row_for_each_vector():
    one, two = (allot([0.5], [ROOT], GAINS, free, 7, width) for width in (1, 2))
    assert sum(one.prompts) == 5 and sum(two.prompts) == 2


trees = st.integers(1, 8).flatmap(
    lambda size: st.tuples(
        st.lists(st.floats(0.05, 0.5), min_size=size, max_size=size),
        st.tuples(*(st.integers(ROOT, node - 1) for node in range(size))),
    )
)


@given(trees, st.integers(2, 40))
def test_it_is_at_least_as_good_as_the_same_for_each(tree, most: int):
    """With as many prompts behind every node: the uniform tree of the paper's comparison."""
    shares, parents = tree
    total = {ROOT: 1.0}
    probabilities: list[float] = []
    for share, parent in zip(shares, parents, strict=True):
        # Children of one node may not be more likely than it, together.
        probabilities.append(0.5 * share * (1.0 if parent == ROOT else probabilities[parent]) / len(shares))
        total[parent] = 0.0
    found = allot(probabilities, parents, GAINS, free, most)
    assert 1 + len(found.nodes) + sum(found.prompts) <= most
    assert all(parents[node] in (ROOT, *found.nodes) for node in found.nodes)
    every = 1 + len(found.nodes)
    for count in range(4):
        if every * (1 + count) <= most:
            uniform = worth(probabilities, parents, found.nodes, [count] * every)
            assert worth(probabilities, parents, found.nodes, found.prompts) >= uniform - 1e-9


def test_gains_are_what_a_level_adds_to_the_best_tree():
    assert gains([[0.5, 0.25], [0.4, 0.2]]) == pytest.approx([0.75, 0.75 * 0.6])
    # A later prompt is never worth more than the one before it: it stands behind that.
    assert gains([[0.1], [1.0]]) == pytest.approx([0.1, 0.1])
