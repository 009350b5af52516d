"""Drafts as trees: depths, paths, masks, and what clamping keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.engine import ROOT, Draft, Drawn, Probe, SoftRows

TREE = Draft([10, 11, 12, 13, 14, 15], [ROOT, ROOT, 0, 0, 2, 1])
"""10 -> (12 -> 14, 13); 11 -> 15."""


def trees():
    """Sound trees of up to 12 nodes, tokens 0 to 4."""
    return st.integers(0, 12).flatmap(
        lambda count: st.builds(
            Draft,
            st.lists(st.integers(0, 4), min_size=count, max_size=count),
            st.tuples(*(st.integers(ROOT, node - 1) for node in range(count))).map(list),
        )
    )


def test_shape():
    assert len(TREE) == 6
    assert TREE.depths() == [1, 1, 2, 2, 3, 2]
    assert TREE.children() == {ROOT: [0, 1], 0: [2, 3], 2: [4], 1: [5]}
    assert TREE.path(4) == [0, 2, 4]
    assert TREE.path(ROOT) == []
    assert not TREE.is_chain


def test_chain():
    chain = Draft.chain([7, 8, 9])
    assert chain.parents == [ROOT, 0, 1]
    assert chain.is_chain
    assert chain.mask() is None
    assert chain.depths() == [1, 2, 3]
    assert Draft.chain([]) == Draft()
    assert not Draft()


def test_mask():
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 1, 0, 1, 0],
        [1, 0, 1, 0, 0, 0, 1],
    ]
    assert TREE.mask().int().tolist() == expected


@given(trees())
def test_mask_shows_each_row_its_path(draft):
    mask = draft.mask()
    if mask is None:
        assert draft.is_chain
        mask = torch.ones(len(draft) + 1, len(draft) + 1, dtype=torch.bool).tril()
    for node in [ROOT, *range(len(draft))]:
        seen = {row - 1 for row in range(len(draft) + 1) if mask[node + 1, row]}
        assert seen == {ROOT, *draft.path(node)}
        assert len(draft.path(node)) == (0 if node == ROOT else draft.depths()[node])


def test_clamped_keeps_a_sound_draft_as_it_is():
    assert TREE.clamped(6, 3, 16) is TREE
    assert Draft().clamped(5, 5, 5) == Draft()


def test_clamped_cuts_nodes_and_levels():
    assert TREE.clamped(3, 3, 16) == Draft([10, 11, 12], [ROOT, ROOT, 0])
    assert TREE.clamped(6, 2, 16) == Draft([10, 11, 12, 13, 15], [ROOT, ROOT, 0, 0, 1])
    assert TREE.clamped(6, 1, 16) == Draft([10, 11], [ROOT, ROOT])
    assert TREE.clamped(0, 3, 16) == TREE.clamped(6, 0, 16) == Draft()
    assert Draft.chain(range(500)).clamped(64, 100, 1000) == Draft.chain(range(64))


def test_clamped_drops_what_stands_below_a_bad_token():
    assert TREE.clamped(6, 3, 15) == Draft([10, 11, 12, 13, 14], [ROOT, ROOT, 0, 0, 2])
    bad = Draft([10, -1, 12, 13, 14, 15], [ROOT, ROOT, 0, 1, 3, 1])
    assert bad.clamped(6, 3, 16) == Draft([10, 12], [ROOT, 0])


def test_clamped_drops_bad_parents():
    assert Draft([1, 2, 3], [0, ROOT, 1]).clamped(9, 9, 9) == Draft([2, 3], [ROOT, 0])
    assert Draft([1, 2, 3], [ROOT, 7, -2]).clamped(9, 9, 9) == Draft([1], [ROOT])
    assert Draft([1, 2, 3], [ROOT, 0]).clamped(9, 9, 9) == Draft([1, 2], [ROOT, 0])
    assert Draft([1, 2], [ROOT, 0, 1, 2]).clamped(9, 9, 9) == Draft([1, 2], [ROOT, 0])


def test_clamped_keeps_drawn_with_its_node():
    q = Drawn(torch.ones(4, dtype=torch.float64))
    draft = Draft([9, 1, 2, 3], [ROOT, ROOT, 1, 2], {ROOT: q, 1: q, 2: q})
    # 9 is outside the vocabulary, so its sampled siblings after it go, and everything below them.
    assert draft.clamped(9, 9, 4).tokens == []
    # As the last of them it goes alone.
    draft = Draft([1, 9, 2, 3], [ROOT, ROOT, 0, 2], {ROOT: q, 0: q, 1: q})
    clamped = draft.clamped(9, 9, 4)
    assert (clamped.tokens, clamped.parents) == ([1, 2, 3], [ROOT, 0, 1])
    assert clamped.drawn == {ROOT: q, 0: q}


messy = st.builds(
    Draft,
    st.lists(st.integers(-3, 8), max_size=10),
    st.lists(st.integers(-3, 10), max_size=12),
    st.sets(st.integers(ROOT, 9)).map(lambda nodes: dict.fromkeys(nodes, Drawn(torch.ones(6)))),
)


@given(messy, st.integers(0, 8), st.integers(0, 5))
def test_clamped_makes_anything_sound(draft, nodes, depth):
    kept = draft.clamped(nodes, depth, 6)
    assert len(kept.tokens) == len(kept.parents) <= nodes
    assert all(0 <= token < 6 for token in kept.tokens)
    assert all(ROOT <= parent < node for node, parent in enumerate(kept.parents))
    assert max(kept.depths(), default=0) <= depth
    assert kept.clamped(nodes, depth, 6) is kept
    # Each kept path was a path of the draft.
    original = {tuple(draft.tokens[step] for step in path) for path in sound_paths(draft)}
    for node in range(len(kept)):
        assert tuple(kept.tokens[step] for step in kept.path(node)) in original


def sound_paths(draft: Draft) -> list[list[int]]:
    """Paths from the root along parents that come before their children."""
    paths = {ROOT: []}
    for node, (_, parent) in enumerate(zip(draft.tokens, draft.parents, strict=False)):
        if parent < node and parent in paths:
            paths[node] = [*paths[parent], node]
    return list(paths.values())


@pytest.mark.parametrize(
    ("came", "verdicts"),
    [
        ([5, 6, 9], [True, True, False, False, False]),
        ([5, 6], [True, True, False, None, False]),
        ([8, 6, 7], [False, False, True, False, False]),
        ([1], [False, False, False, False, False]),
        ([5], [True, None, False, None, None]),
    ],
)
def test_judged_by_what_came(came, verdicts):
    draft = Draft([5, 6, 8, 7, 4], [-1, 0, -1, 1, 0])
    assert draft.judged(came) == verdicts


# Probes

PROBED = Draft([10, 11, 12], [ROOT, ROOT, 0], probes=[Probe(ROOT, [9, 9]), Probe(2, [9]), Probe(1, [9, 8])])


def test_probes_stand_behind_their_nodes():
    assert PROBED.probed() == ([9, 9, 9, 9, 8], [1, 2, 3, 2, 3])
    assert Draft(probes=[Probe(ROOT, [9, 9, 9])]).probed() == ([9, 9, 9], [1, 2, 3])
    assert TREE.probed() == ([], [])


def test_probes_see_what_is_above_them_and_their_own():
    """Rows: the root, the nodes 10, 11 and 12, the three groups."""
    expected = [
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 1, 1, 0, 0, 0],
        [1, 0, 0, 0, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 1, 0, 0],
        [1, 0, 1, 0, 0, 0, 0, 1, 1],
        [1, 0, 1, 0, 0, 0, 0, 1, 1],
    ]
    assert PROBED.mask().int().tolist() == expected
    chain = Draft.chain([7])
    chain.probes = [Probe(ROOT, [9]), Probe(0, [9])]
    assert chain.mask().int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]


def test_rows_whose_logits_are_wanted():
    assert PROBED.heard() == list(range(4 + 5))
    quiet = Draft([10, 11], [ROOT, 0], probes=[Probe(ROOT, [9, 9, 9], 1), Probe(0, [9], 2), Probe(1, [9, 8])])
    assert quiet.heard() == [0, 1, 2, 4, 5, 7, 8]
    assert quiet.subset([0]).probes == [Probe(ROOT, [9, 9, 9], 1), Probe(0, [9], 2)]
    assert quiet.clamped(1, 9, 16).probes == quiet.subset([0]).probes
    assert list(TREE.heard()) == list(range(len(TREE) + 1))


def test_probes_go_with_their_nodes():
    assert PROBED.subset([1]).probes == [Probe(ROOT, [9, 9]), Probe(0, [9, 8])]
    assert PROBED.subset([]).probes == [Probe(ROOT, [9, 9])]
    assert PROBED.clamped(3, 3, 16) is PROBED
    assert PROBED.clamped(3, 1, 16).probes == [Probe(ROOT, [9, 9]), Probe(1, [9, 8])]
    # Node 10 is outside the vocabulary, and 12 below it.
    assert Draft([99, 11, 12], PROBED.parents, probes=PROBED.probes).clamped(3, 3, 16).probes == [
        Probe(ROOT, [9, 9]),
        Probe(0, [9, 8]),
    ]


def soft(*ahead: int) -> SoftRows:
    """Rows that see those of the same kind before them; kinds take turns."""
    number = torch.arange(len(ahead))
    sees = (number[:, None] >= number) & ((number[:, None] - number) % 2 == 0)
    return SoftRows(torch.full((len(ahead), 4), float(len(ahead))), ahead, sees)


def test_soft_rows_say_where_they_stand_and_what_they_see():
    """Rows: the root, the nodes 10 and 11, the root's three vectors, a mask behind 11, and two vectors there."""
    draft = Draft([10, 11], [ROOT, 0])
    draft.probes = [Probe.of(ROOT, soft(1, 1, 2)), Probe(1, [9]), Probe.of(1, soft(1, 1))]
    assert draft.probed() == ([-1, -1, -1, 9, -1, -1], [1, 1, 2, 3, 3, 3])
    assert draft.mask().int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 1, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 1, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 1],
    ]
    assert [(row, states.shape[0]) for row, states in draft.embedded()] == [(3, 3), (7, 2)]
    assert (draft.rows, draft.heard()) == (8, [0, 1, 2, 6])
    assert draft.subset([0]).embedded()[0][0] == 2 and draft.subset([0]).rows == 4
