"""Closed forms against enumerations that share nothing with them: all draws of all schedules, all partitions."""

from __future__ import annotations

import math
from itertools import combinations, pairwise, permutations, product
from pathlib import Path

import pytest

from hasten.errors import UserError
from hasten.tasks.parallelbench import OPERATIONS, SEVERAL_ANSWERS
from hasten.tasks.parallelbench.theory import (
    accuracy,
    correlation,
    full_parallel_accuracy,
    least_lower_bound,
    lower_bound,
    problem_of_size,
    random_order_accuracy,
    table,
    total_correlation,
)

Answers = list[tuple[int, ...]]


def marginal(answers: Answers, position: int) -> dict[int, float]:
    column = [answer[position] for answer in answers]
    return {token: column.count(token) / len(column) for token in column}


def draw_everything(answers: Answers, steps: list[tuple[int, ...]]) -> float:
    """The accuracy of one schedule: walks through every combination of tokens, wrong ones included."""
    if not steps:
        return 1.0
    marginals = [marginal(answers, position) for position in steps[0]]
    total = 0.0
    for tokens in product(*marginals):
        chance = math.prod(table[token] for table, token in zip(marginals, tokens, strict=True))
        left = [a for a in answers if all(a[i] == token for i, token in zip(steps[0], tokens, strict=True))]
        if left:
            total += chance * draw_everything(left, steps[1:])
    return total


def all_orders(answers: Answers, per_step: int) -> float:
    """The mean over all orders of the positions, cut into steps."""
    length = len(answers[0])
    values = [
        draw_everything(answers, [order[i : i + per_step] for i in range(0, length, per_step)])
        for order in permutations(range(length))
    ]
    return sum(values) / len(values)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_accuracy_is_that_of_all_orders_and_draws(operation: str, n: int) -> None:
    answers = problem_of_size(operation, n).answers()
    for per_step in range(1, n + 2):
        expected = all_orders(answers, per_step) if len(answers[0]) < 5 else random_order_accuracy(answers, per_step)
        assert accuracy(operation, n, per_step) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_full_parallel_accuracy_is_the_product_of_marginals_on_the_answers(operation: str, n: int) -> None:
    answers = problem_of_size(operation, n).answers()
    marginals = [marginal(answers, position) for position in range(len(answers[0]))]
    mass = [math.prod(marginals[i][token] for i, token in enumerate(answer)) for answer in answers]
    assert full_parallel_accuracy(operation, n) == pytest.approx(math.fsum(mass), abs=1e-12)
    # The least divergence of a product of marginals from the truth is the total correlation.
    divergence = math.fsum(math.log(1 / len(answers) / q) for q in mass) / len(answers)
    assert correlation(operation, n) == pytest.approx(divergence, abs=1e-12)
    assert total_correlation(answers) == pytest.approx(divergence, abs=1e-12)


@pytest.mark.parametrize("operation", sorted(SEVERAL_ANSWERS))
def test_one_token_a_step_is_always_right_and_more_is_not(operation: str) -> None:
    for n in (3, 4, 6, 8):
        assert accuracy(operation, n, 1) == pytest.approx(1, abs=1e-12)
        assert accuracy(operation, n, 2) < 0.95
    assert accuracy("copy", 15, 15) == 1


def test_closed_forms_agree_with_counting_at_n_6() -> None:
    for operation in ("replace_random", "remove_random", "insert_random"):
        for per_step in (1, 2, 3, 4, 6, 7):
            counted = random_order_accuracy(problem_of_size(operation, 6).answers(), per_step)
            assert accuracy(operation, 6, per_step) == pytest.approx(counted, abs=1e-12)
    counted = random_order_accuracy(problem_of_size("shuffle", 5).answers(), 2)
    assert accuracy("shuffle", 5, 2) == pytest.approx(counted, abs=1e-12)


def test_published_figures() -> None:
    """The paper's repository: 44.4 % for replacing and 22.2 % for shuffling three items in one step."""
    assert round(100 * full_parallel_accuracy("replace_random", 3), 1) == 44.4
    assert round(100 * full_parallel_accuracy("shuffle", 3), 1) == 22.2
    assert full_parallel_accuracy("replace_random", 10**6) == pytest.approx(1 / math.e, rel=1e-5)


def all_partitions(positions: tuple[int, ...], steps: int) -> list[list[tuple[int, ...]]]:
    if steps == 1:
        return [[positions]]
    return [
        [step, *rest]
        for size in range(1, len(positions) - steps + 2)
        for step in combinations(positions, size)
        for rest in all_partitions(tuple(i for i in positions if i not in step), steps - 1)
    ]


def conditional_correlation(answers: Answers, before: list[int], step: tuple[int, ...]) -> float:
    """E[C(S_t | X, S_<t)] as a divergence, averaged over what may be committed before."""
    total = 0.0
    for answer in answers:
        possible = [a for a in answers if all(a[i] == answer[i] for i in before)]
        joint = sum(all(a[i] == answer[i] for i in step) for a in possible) / len(possible)
        total += math.log(joint / math.prod(marginal(possible, i)[answer[i]] for i in step))
    return total / len(answers)


@pytest.mark.parametrize("operation", ["copy", *sorted(SEVERAL_ANSWERS)])
def test_lower_bounds(operation: str) -> None:
    answers = problem_of_size(operation, 3).answers()
    length = len(answers[0])
    least = []
    for steps in range(1, length + 1):
        bounds = []
        for partition in all_partitions(tuple(range(length)), steps):
            befores = [[i for step in partition[:t] for i in step] for t in range(steps)]
            expected = sum(conditional_correlation(answers, b, s) for b, s in zip(befores, partition, strict=True))
            assert lower_bound(answers, partition) == pytest.approx(expected, abs=1e-12)
            bounds.append(expected)
        least.append(least_lower_bound(answers, steps))
        assert least[-1] == pytest.approx(min(bounds), abs=1e-12)
    assert least[0] == pytest.approx(correlation(operation, 3), abs=1e-12)
    assert least[-1] == pytest.approx(0, abs=1e-12)
    assert all(more <= fewer + 1e-12 for fewer, more in pairwise(least))


def test_shuffles_bound_depends_on_the_sizes_of_the_steps_alone() -> None:
    """C of k of m items left is k ln m - ln(m! / (m - k)!): the more are left, the more may be filled."""
    answers = problem_of_size("shuffle", 6).answers()
    expected = sum(2 * math.log(m) - math.log(math.perm(m, 2)) for m in (6, 4, 2))
    assert lower_bound(answers, [(0, 3), (1, 5), (2, 4)]) == pytest.approx(expected, abs=1e-12)
    falling = sum(k * math.log(m) - math.log(math.perm(m, k)) for m, k in ((6, 3), (3, 2), (1, 1)))
    rising = sum(k * math.log(m) - math.log(math.perm(m, k)) for m, k in ((6, 1), (5, 2), (3, 3)))
    assert lower_bound(answers, [(0, 1, 2), (3, 4), (5,)]) == pytest.approx(falling, abs=1e-12)
    assert lower_bound(answers, [(0,), (1, 2), (3, 4, 5)]) == pytest.approx(rising, abs=1e-12)
    assert least_lower_bound(answers, 3) == pytest.approx(falling, abs=1e-12)


def test_the_documented_table_is_the_computed_one() -> None:
    assert table() in (Path(__file__).parents[2] / "docs/parallelbench.md").read_text()


def test_bad_input_is_told() -> None:
    with pytest.raises(UserError, match="at least 2 items"):
        accuracy("shuffle", 1, 1)
    with pytest.raises(UserError, match="at least one position"):
        accuracy("shuffle", 3, 0)
    with pytest.raises(UserError, match="1 to 3 steps"):
        least_lower_bound(problem_of_size("copy", 3).answers(), 4)
