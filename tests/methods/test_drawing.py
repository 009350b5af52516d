"""Children drawn: the likeliest, in the order of shared noise, without replacement by a drafter's own coins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice, permutations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from hasten import SamplingParams
from hasten.engine import ROOT, Draft
from hasten.engine.sampling.noise import Uniforms
from hasten.engine.sampling.sampler import Distribution, Sampler, draw
from hasten.methods.drafters.drawing import Beliefs, Matching, likeliest, order_of_noise, processed, sampled

SIZE = 12


def first(q: Sequence[float], count: int, coins: Uniforms) -> list[int]:
    children = sampled(Draft(), ROOT, torch.tensor(q, dtype=torch.float64), None, coins)
    return [token for token, _ in islice(children, count)]


def test_draws_without_replacement():
    """The law of the first two of four, exactly."""
    q = [0.45, 0.3, 0.2, 0.05]
    coins = Uniforms(1)
    draws = Counter(tuple(first(q, 2, coins)) for _ in range(4000))
    pairs = list(permutations(range(4), 2))
    expected = [q[i] * q[j] / (1 - q[i]) for i, j in pairs]
    assert chisquare([draws[pair] for pair in pairs], 4000 * np.array(expected)).pvalue > 0.001
    assert sorted(first(q, 9, coins)) == [0, 1, 2, 3]


weights = st.lists(st.sampled_from([0.0, 0.0, 1.0, 2.0, 5.0, 0.1]), min_size=1, max_size=12).filter(sum)


@given(weights, st.integers(0, 1000), st.booleans())
def test_implicit_residual_is_the_explicit_one(weights, seed, named):
    """The same coins give the same tokens as drawing from what is left, written out."""
    q = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    ids = torch.arange(len(q)) * 3 + 1 if named else None
    draft = Draft()
    drawn = list(sampled(draft, ROOT, q, ids, Uniforms(seed)))
    coins, rest = Uniforms(seed), q.clone()
    for token, probability in drawn:
        column = draw(rest, coins.draw())
        assert token == (column if ids is None else int(ids[column]))
        assert probability == float(q[column]) > 0
        rest[column] = 0
    assert not rest.any()
    assert draft.drawn[ROOT].probabilities is q


def request(**params: Any) -> Any:
    asked = SamplingParams(seed=3, **params)
    return SimpleNamespace(id=4, tokens=[1, 2, 3], params=asked, sampler=Sampler(asked, 0, [1, 2, 3], SIZE))


LOGITS = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(0))
PATHS = [[], [5]]


def test_the_likeliest_and_nothing_impossible():
    asked = request(temperature=0.0)
    got = likeliest(processed(asked.sampler, LOGITS, PATHS), 3)
    for row, children in zip(LOGITS.softmax(-1), got, strict=True):
        assert [token for token, _ in children] == row.topk(3).indices.tolist()
        assert [probability for _, probability in children] == pytest.approx(row.topk(3).values.tolist())
    forbidden = torch.full((2, SIZE), -torch.inf)
    forbidden[0, 7] = 1.0
    assert likeliest(Distribution(forbidden, None, SIZE), 3) == [[(7, 1.0)], []]
    named = Distribution(LOGITS[:1, :2].sort(descending=True).values, torch.tensor([[9, 4]]), SIZE)
    assert [token for token, _ in likeliest(named, 99)[0]] == [9, 4]


@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.2}])
def test_the_order_of_shared_noise_is_the_targets(filters):
    asked = request(temperature=0.8, **filters)
    matching = Matching(asked, Beliefs().of(asked))
    distribution = processed(asked.sampler, LOGITS, PATHS)
    positions = [3 + len(path) for path in PATHS]
    rows = [list(row) for row in matching.children(distribution, [ROOT, 0], PATHS, SIZE)]
    assert [row[0][0] for row in rows] == asked.sampler.choose(LOGITS, positions, PATHS)
    for number, (node, row) in enumerate(zip((ROOT, 0), rows, strict=True)):
        dense = distribution.dense(number)
        assert {token for token, _ in row} == {token for token in range(SIZE) if dense[token] > 0}
        for token, probability in row:
            alone, alike = matching.cases[node, token]
            assert alone == pytest.approx(float(dense[token]), abs=1e-6)
            assert min(alone, alike) - 1e-9 <= probability <= max(alone, alike) + 1e-9
        ids = [token for token, _ in row]
        few = order_of_noise(asked.sampler, positions[number], sorted(ids), [float(dense[i]) for i in sorted(ids)], 3)
        assert [sorted(ids)[place] for place in few] == ids[:3]


def test_beliefs_learn_from_what_came_where_the_draft_began():
    asked = request(temperature=0.8)
    beliefs = Beliefs()
    for came, start, moves in (([2], 3, True), ([2], 2, False)):
        matching, draft = Matching(asked, beliefs.of(asked)), Draft.chain([2, 4])
        matching.cases = {(ROOT, 2): (0.1, 0.9), (0, 4): (0.1, 0.9)}
        beliefs.drafted(asked, matching, draft)
        before = beliefs.of(asked).odds
        seen: Any = SimpleNamespace(tokens=came)
        now: Any = SimpleNamespace(id=4, tokens=[0] * (start + len(came)))
        beliefs.observe(now, seen)
        # It was likelier if both draw alike.
        assert (beliefs.of(asked).odds < before) == moves
    beliefs.end(asked)
    assert not beliefs._beliefs and not beliefs._drafted
