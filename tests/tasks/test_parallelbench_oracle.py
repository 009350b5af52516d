"""The oracle's marginals are those of enumeration, and decoding with it gives the accuracies of the theory."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest

from hasten.errors import UserError
from hasten.tasks.parallelbench import OPERATIONS, SEVERAL_ANSWERS, CountingOracle, ListProblem, Oracle, list_oracle
from hasten.tasks.parallelbench.theory import accuracy, problem_of_size

RUNS = 4000


def decode(oracle: Oracle, per_step: int, rng: np.random.Generator, runs: int = RUNS) -> np.ndarray:
    """Sampled canvases [runs, length], filled `per_step` positions a step in uniformly random order."""
    ids = np.zeros((runs, oracle.length), dtype=np.int64)
    masked = np.ones_like(ids, dtype=bool)
    while masked.any():
        cumulative = oracle.marginals(ids, masked).cumsum(-1)
        drawn = (rng.random((*ids.shape, 1)) * cumulative[..., -1:] >= cumulative).sum(-1)
        order = np.where(masked, rng.random(ids.shape), 2.0).argsort(-1)[:, :per_step]
        chosen = np.zeros_like(masked)
        np.put_along_axis(chosen, order, True, axis=-1)
        chosen &= masked
        ids[chosen] = drawn[chosen]
        masked &= ~chosen
    return ids


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("n", [3, 4, 6])
def test_decoding_has_the_accuracy_of_the_theory(operation: str, n: int) -> None:
    problem = problem_of_size(operation, n)
    answers = set(problem.answers())
    oracle = list_oracle(problem, vocabulary=n + 1)
    for per_step in sorted({1, 2, 3, n, problem.length}):
        canvases = decode(oracle, per_step, np.random.default_rng([n, per_step]))
        right = np.mean([answer in answers for answer in map(tuple, canvases.tolist())])
        expected = accuracy(operation, n, per_step)
        if per_step == 1 or operation not in SEVERAL_ANSWERS:
            assert right == 1
        assert abs(right - expected) <= 3 * math.sqrt(expected * (1 - expected) / RUNS) + 1e-9
        assert oracle.consistent(canvases, np.zeros_like(canvases, dtype=bool)).mean() == right


def test_decoding_long_lists_one_by_one_is_always_right() -> None:
    for operation in OPERATIONS:
        problem = problem_of_size(operation, 15)
        canvases = decode(list_oracle(problem, 16), 1, np.random.default_rng(0), runs=100)
        assert all(problem.accepts(answer) for answer in map(tuple, canvases.tolist()))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_marginals_are_those_of_enumeration(operation: str) -> None:
    """Canvases with any tokens committed, most of them wrong, alone and as a batch."""
    rng = np.random.default_rng(0)
    items = (7, 3, 9, 4)
    word = 5 if "insert" in operation or "replace" in operation else None
    problem = ListProblem(operation, items, word, 1 if "index" in operation else None)
    pool = (*items, 5)
    answers = [a for a in permutations(pool, problem.length) if problem.accepts(a)]
    oracle = list_oracle(problem, vocabulary=11)
    ids = np.array([answers[rng.integers(len(answers))] for _ in range(150)])
    wrong = rng.random(ids.shape) < 0.15
    ids = np.where(wrong, rng.integers(0, 11, ids.shape), ids)
    masked = rng.random(ids.shape) < 0.5
    batch = oracle.marginals(ids, masked)
    assert batch.dtype == np.float64 and batch.shape == (150, problem.length, 11)
    agreements = []
    for i in range(150):
        agreeing = [a for a in answers if all(m or x == y for x, y, m in zip(a, ids[i], masked[i], strict=True))]
        expected = np.zeros((problem.length, 11))
        for answer in agreeing or answers:
            expected[np.arange(problem.length), answer] += 1 / len(agreeing or answers)
        expected[~masked[i]] = np.eye(11)[ids[i][~masked[i]]]
        np.testing.assert_allclose(batch[i], expected, atol=1e-12)
        np.testing.assert_array_equal(oracle.marginals(ids[i], masked[i]), batch[i])
        assert oracle.consistent(ids[i], masked[i]) == bool(agreeing)
        agreements.append(bool(agreeing))
    assert 0 < sum(agreements) < 150


def test_items_of_another_kind_keep_their_order() -> None:
    """Sorted are the words, not their ids."""
    ids = {"pear": 0, "fig": 2, "apple": 1}
    oracle = list_oracle(ListProblem("sort", tuple(ids)), 3, ids.__getitem__)
    everything = np.ones(3, dtype=bool)
    assert oracle.marginals(np.zeros(3, dtype=np.int64), everything).argmax(-1).tolist() == [1, 2, 0]


def test_answers_of_the_grader_alone() -> None:
    """Without the input among the orders, `CountingOracle` decodes only what the shuffle task's grader accepts."""
    problem = problem_of_size("shuffle", 3)
    oracle = CountingOracle([a for a in problem.answers() if a != problem.items], 3)
    canvases = decode(oracle, 1, np.random.default_rng(0))
    assert {tuple(a) for a in canvases.tolist()} == set(problem.answers()) - {problem.items}


def test_bad_input_is_told() -> None:
    problem = problem_of_size("shuffle", 3)
    with pytest.raises(UserError, match="from 0 to 1"):
        list_oracle(problem, 2)
    with pytest.raises(UserError, match="3 positions"):
        list_oracle(problem, 3).marginals(np.zeros(4, dtype=np.int64), np.ones(4, dtype=bool))
