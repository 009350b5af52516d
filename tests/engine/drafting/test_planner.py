"""The planner against brute force, and the calibration of estimates."""

from __future__ import annotations

import random
from itertools import product

import pytest

from hasten.engine import Draft
from hasten.engine.drafting.cost import VerifyCost
from hasten.engine.drafting.planner import Calibration, Planner

LINEAR = VerifyCost((1, 2, 64), (64,), ((1.0, 1.1, 7.3),), 0.05)


def test_rows_that_cost_nothing_are_all_verified():
    free = Planner(VerifyCost((1, 2, 64), (64,), ((1.0, 1.0, 1.0),), 0.0))
    assert free.plan([[0.5, 0.01, 0.001]], 64).nodes == [[0, 1, 2]]


def test_a_draft_that_does_not_pay_is_left_out():
    plan = Planner(LINEAR).plan([[0.05, 0.04]], 64)
    assert plan.nodes == [[]]
    assert plan.rate == pytest.approx(1.0)


def test_drafting_time_makes_the_rate_worse_but_is_spent():
    assert Planner(LINEAR).plan([[0.9]], 64, spent=1.0).rate == pytest.approx(1.9 / 2.1)


@pytest.mark.parametrize("seed", range(30))
def test_no_other_choice_of_nodes_is_better(seed):
    rng = random.Random(seed)
    planner = Planner(LINEAR)
    requests = []
    for _ in range(rng.randint(1, 3)):
        chain, p = [], 1.0
        for _ in range(rng.randint(0, 4)):
            p *= rng.random()
            chain.append(p)
        requests.append(chain)
    others = rng.randint(0, 2)
    batch = len(requests) + others
    plan = planner.plan(requests, 64, spent=0.1, others=others)
    best = 0.0
    for sizes in product(*(range(len(chain) + 1) for chain in requests)):
        tokens = batch + sum(sum(chain[:size]) for chain, size in zip(requests, sizes, strict=True))
        best = max(best, planner.rate(tokens, batch + sum(sizes), 64, batch, 0.1))
    assert plan.rate == pytest.approx(best)
    kept = sum(p for chain, nodes in zip(requests, plan.nodes, strict=True) for p in (chain[i] for i in nodes))
    rows = batch + sum(map(len, plan.nodes))
    assert planner.rate(batch + kept, rows, 64, batch, 0.1) == pytest.approx(best)


def test_larger_batches_never_draft_more_per_request():
    planner = Planner(LINEAR)
    chain = [0.8**depth for depth in range(1, 20)]
    sizes = [len(planner.plan([chain] * batch, 64).nodes[0]) for batch in (1, 2, 4, 8, 16)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


def test_calibration_learns_what_a_drafter_is_worth():
    rng = random.Random(0)
    boastful = Calibration()
    draft = Draft.chain([5, 6, 7], [0.9, 0.81, 0.73])
    for _ in range(400):
        path: list[int] = []
        while len(path) < 3 and rng.random() < 0.4:
            path.append(len(path))
        boastful.observe(draft, [node in path for node in range(3)])
    assert boastful.probabilities(draft) == pytest.approx([0.4, 0.16, 0.064], abs=0.1)


def test_without_estimates_depth_decides():
    calibration = Calibration()
    draft = Draft.chain([5, 6, 7])
    before = calibration.probabilities(draft)
    assert before == pytest.approx([0.5, 0.25, 0.125])
    for _ in range(200):
        calibration.observe(draft, [True, True, True])
    assert min(calibration.probabilities(draft)) > 0.9


def test_no_node_is_likelier_than_its_parent():
    calibration = Calibration()
    draft = Draft([5, 6, 7], [-1, 0, -1], estimates=[0.2, 0.9, 0.3])
    first, second, _ = calibration.probabilities(draft)
    assert second <= first


def test_old_observations_fade():
    calibration = Calibration()
    draft = Draft.chain([5], [0.5])
    for _ in range(2000):
        calibration.observe(draft, [True])
    for _ in range(600):
        calibration.observe(draft, [False])
    assert calibration.probabilities(draft)[0] < 0.45


def test_what_is_not_known_is_not_counted():
    calibration = Calibration()
    draft = Draft.chain([5, 6], [0.9, 0.2])
    before = calibration.probabilities(draft)[1]
    for _ in range(50):
        calibration.observe(draft, [True, None])
    assert calibration.probabilities(draft)[1] == pytest.approx(before)
