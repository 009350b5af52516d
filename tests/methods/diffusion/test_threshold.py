"""Tokens that are sure together: the rules by their definitions, and what they cost where the answers are known."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from canvases import committed, decode, list_model, oracle, run, view_of

from hasten.engine import Engine, Request, SamplingParams
from hasten.tasks.parallelbench.operations import ListProblem
from hasten.tasks.parallelbench.theory import accuracy

NOBODY: Any = None


def method(spec: str) -> Any:
    return Engine(oracle("full-same")).drafter(spec)[1]


# The rules


def test_all_above_a_threshold_and_always_the_surest() -> None:
    for confidence, expected in (
        ([0.95, 0.5, 0.91, 0.89], {0, 2}),
        ([0.3, 0.6, 0.5, 0.6], {1}),
        ([0.99, 0.99, 0.99, 0.99], {0, 1, 2, 3}),
    ):
        view = view_of(confidence)
        method("threshold:threshold=0.9").update(NOBODY, view)
        assert committed(view) == expected


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.9])
def test_as_many_as_their_confidences_allow_together(factor: float) -> None:
    rng = random.Random(0)
    policy, sizes = method(f"factor:factor={factor}"), set()
    for _ in range(200):
        confidence = [1 - rng.uniform(0.02, 0.9) ** 2 for _ in range(rng.randint(1, 10))]
        view = view_of(confidence)
        policy.update(NOBODY, view)
        ranked = sorted(confidence, reverse=True)
        fitting = [n for n in range(1, len(ranked) + 1) if (n + 1) * (1 - ranked[n - 1]) <= factor]
        size = max([1, *fitting])
        assert committed(view) == set(sorted(range(len(ranked)), key=lambda row: -confidence[row])[:size])
        sizes.add(size)
    assert len(sizes) > 2


# The ideal model of a list operation


def problem(operation: str, n: int) -> ListProblem[int]:
    word = n + 1 if operation in ("replace_random", "insert_random") else None
    return ListProblem(operation, tuple(range(1, n + 1)), word)


def answer(operation: str, n: int, spec: str, **params: Any) -> Request:
    listed = problem(operation, n)
    model, prompt = list_model(listed)
    return decode(model, spec, prompt, max_tokens=listed.length, **params)


def right(listed: ListProblem[int], spec: str, runs: int) -> float:
    """The share of right answers when sampling at temperature 1."""
    model, prompt = list_model(listed)
    jobs = [
        (prompt, SamplingParams(max_tokens=listed.length, temperature=1.0, seed=seed), spec) for seed in range(runs)
    ]
    requests = [request for first in range(0, runs, 32) for request in run(Engine(model), *jobs[first : first + 32])]
    return sum(listed.accepts(request.output) for request in requests) / runs


@pytest.mark.parametrize("operation", ["replace_random", "shuffle"])
@pytest.mark.parametrize(("n", "per_step"), [(3, 2), (3, 3), (4, 2), (4, 4)])
def test_parallel_decoding_is_as_good_as_theory_says(operation: str, n: int, per_step: int) -> None:
    """Random order, within 3 standard deviations."""
    expected, runs = accuracy(operation, n, per_step), 600
    share = right(problem(operation, n), f"denoise:order=random,per_step={per_step}", runs)
    assert abs(share - expected) <= 3 * math.sqrt(expected * (1 - expected) / runs)


@pytest.mark.parametrize("operation", ["replace_random", "shuffle"])
@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("order", ["random", "confidence", "margin", "entropy"])
def test_one_at_a_time_is_always_right(operation: str, n: int, order: str) -> None:
    assert right(problem(operation, n), f"denoise:order={order}", 30) == 1


def test_one_answer_is_right_however_it_is_decoded() -> None:
    for spec in ("denoise:per_step=6", "threshold", "factor", "dparallel", "localleap"):
        request = answer("copy", 6, spec)
        assert request.output == [1, 2, 3, 4, 5, 6]
        assert request.statistics.steps == 1


@pytest.mark.parametrize("n", range(6, 16))
def test_the_factor_rule_replaces_in_two_passes(n: int) -> None:
    """Five of six positions stay certainly enough; the sixth then has the word for certain."""
    request = answer("replace_random", n, "factor")
    assert problem("replace_random", n).accepts(request.output)
    assert request.statistics.steps == 2


def test_a_threshold_fails_where_each_is_sure_but_not_all_together() -> None:
    for operation in ("replace_random", "shuffle"):
        request = answer(operation, 6, "threshold:threshold=0.9")
        assert problem(operation, 6).accepts(request.output)
        assert request.statistics.steps == 6
    # 14 of 15 answers leave a position as it is, which is above 0.9.
    request = answer("replace_random", 15, "threshold:threshold=0.9")
    assert request.output == list(range(1, 16))
    assert request.statistics.steps == 1
