"""The best that parallel decoding can do: bounds and accuracies of an ideal model that samples.

All valid answers Y of a question are equally likely. A step that fills several positions at once draws each from
its marginal, so it loses what the positions know of each other: the conditional total correlation
C(S | committed) = sum of H(y_i) - H(y_S), in nats. The expected C over the steps is the least Kullback-Leibler
divergence of what is decoded from the truth (ParallelBench, arXiv 2510.04767). Accuracy is the
probability that what was sampled is a valid answer; for `shuffle` these are all n! orders, the input among them.
Closed forms hold for sampling at temperature 1, not for greedy decoding.

    python -m hasten.tasks.parallelbench.theory

prints the table of `docs/parallelbench.md`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from functools import cache
from itertools import combinations

from hasten.errors import UserError

from .operations import OPERATIONS, SEVERAL_ANSWERS, WITH_INDEX, WITH_WORD, ListProblem

Answers = Sequence[Sequence[Hashable]]


def problem_of_size(operation: str, n: int) -> ListProblem[int]:
    """The operation on a list of n items, the numbers from 0; another number for the word, index 0."""
    word = n if operation in WITH_WORD else None
    return ListProblem(operation, tuple(range(n)), word, 0 if operation in WITH_INDEX else None)


# --- for any set of answers, by counting them --------------------------------------------------------------------


def entropy(answers: Answers, positions: Sequence[int]) -> float:
    """The joint entropy of some positions, in nats."""
    counts = Counter(tuple(answer[i] for i in positions) for answer in answers)
    total = len(answers)
    return math.fsum(count / total * math.log(total / count) for count in counts.values())


def lower_bound(answers: Answers, steps: Sequence[Sequence[int]]) -> float:
    """L_T of steps that fill these positions one after the other: the sum of E[C(S_t | X, S_<t)], in nats."""
    bound = 0.0
    before: list[int] = []
    for step in steps:
        known = entropy(answers, before)
        alone = math.fsum(entropy(answers, [*before, position]) - known for position in step)
        together = entropy(answers, [*before, *step]) - known
        bound += alone - together
        before += step
    return bound


def total_correlation(answers: Answers) -> float:
    """C(Y | X): the bound of filling all positions in one step, in nats."""
    return lower_bound(answers, [range(len(answers[0]))])


def least_lower_bound(answers: Answers, steps: int) -> float:
    """The least L_T over all ways to fill the positions in `steps` steps, each of one position or more, in nats.

    Takes 3^length set operations: for short answers.
    """
    length = len(answers[0])
    if not 1 <= steps <= length:
        raise UserError(f"An answer of {length} positions is filled in 1 to {length} steps, not {steps}.")

    @cache
    def joint(filled: frozenset[int]) -> float:
        return entropy(answers, sorted(filled))

    @cache
    def least(filled: frozenset[int], steps: int) -> float:
        rest = sorted(set(range(length)) - filled)
        sizes = [len(rest)] if steps == 1 else range(1, len(rest) - steps + 2)
        costs = []
        for step in (step for size in sizes for step in combinations(rest, size)):
            alone = math.fsum(joint(filled | {position}) - joint(filled) for position in step)
            cost = alone - (joint(filled | set(step)) - joint(filled))
            costs.append(cost + (least(filled | set(step), steps - 1) if steps > 1 else 0.0))
        return min(costs)

    return least(frozenset(), steps)


def random_order_accuracy(answers: Answers, per_step: int) -> float:
    """The exact accuracy of filling `per_step` positions a step, evenly chosen; the last step fills what is left.

    Follows every choice of positions and every draw that keeps an answer possible: for short answers. Each answer
    may occur once.
    """

    @cache
    def accuracy(possible: frozenset[int], masked: tuple[int, ...]) -> float:
        if len(possible) == 1:
            return 1.0
        choices = list(combinations(masked, min(per_step, len(masked))))
        return math.fsum(of_step(possible, masked, step) for step in choices) / len(choices)

    def of_step(possible: frozenset[int], masked: tuple[int, ...], step: tuple[int, ...]) -> float:
        marginals = {i: Counter(answers[a][i] for a in possible) for i in step}
        outcomes: dict[tuple[Hashable, ...], list[int]] = defaultdict(list)
        for a in possible:
            outcomes[tuple(answers[a][i] for i in step)].append(a)
        rest = tuple(i for i in masked if i not in step)
        return math.fsum(
            math.prod(marginals[i][value] / len(possible) for i, value in zip(step, outcome, strict=True))
            * accuracy(frozenset(left), rest)
            for outcome, left in outcomes.items()
        )

    return accuracy(frozenset(range(len(answers))), tuple(range(len(answers[0]))))


# --- the list operations on n items, for any n -------------------------------------------------------------------


def correlation(operation: str, n: int) -> float:
    """C(Y | X) of a list operation on n items in closed form, in nats."""
    check(operation, n)
    if operation == "replace_random":
        return (n - 1) * math.log(n / (n - 1))
    if operation == "shuffle":
        return n * math.log(n) - math.lgamma(n + 1)
    if operation == "insert_random":
        # Of the n + 1 answers, j have at position j the item before, n - j that of the list there, one has the word.
        return n * math.log(n + 1) - 2 / (n + 1) * sum_of_logs(n)
    if operation == "remove_random":
        # Of the n answers, j + 1 have at position j the item behind, the others that of the list there.
        return (n - 2) * math.log(n) - 2 / n * sum_of_logs(n - 1)
    return 0.0


def sum_of_logs(n: int) -> float:
    """The sum of j ln j for j up to n."""
    return math.fsum(j * math.log(j) for j in range(1, n + 1))


def full_parallel_accuracy(operation: str, n: int) -> float:
    """The accuracy of filling all positions in one step, in closed form."""
    check(operation, n)
    if operation == "replace_random":
        return (1 - 1 / n) ** (n - 1)
    if operation == "shuffle":
        return float(math.factorial(n) / n**n)
    if operation == "insert_random":
        return float(math.factorial(n) * 2**n / (n + 1) ** (n + 1))
    if operation == "remove_random":
        return float(math.factorial(n - 1) * 2 ** (n - 1) / n ** (n - 1))
    return 1.0


def accuracy(operation: str, n: int, per_step: int) -> float:
    """The accuracy of filling `per_step` positions a step in uniformly random order; the last step fills what is left.

    In closed form but for insert_random and remove_random, which are counted: for those, n up to about 10.
    """
    check(operation, n)
    if per_step < 1:
        raise UserError(f"A step fills at least one position, not {per_step}.")
    if operation not in SEVERAL_ANSWERS:
        return 1.0
    problem = problem_of_size(operation, n)
    if per_step >= problem.length:
        return full_parallel_accuracy(operation, n)
    if operation == "shuffle":
        # Each step draws k of the m items left; the k must differ.
        return math.prod(math.perm(m, k) / float(m) ** k for m, k in left_and_filled(n, per_step))
    if operation == "replace_random":
        # `waiting`: no step has drawn the word yet, though each position did so with probability 1/m. It must be
        # drawn exactly once; after that every position is certain.
        total, waiting = 0.0, 1.0
        for m, k in left_and_filled(n, per_step):
            total += waiting * k / m * (1 - 1 / m) ** (k - 1)
            waiting *= (1 - 1 / m) ** k
        return total
    return random_order_accuracy(problem.answers(), per_step)


def left_and_filled(length: int, per_step: int) -> list[tuple[int, int]]:
    """For each step: how many positions are masked before it, and how many of them it fills."""
    return [(m, min(per_step, m)) for m in range(length, 0, -per_step)]


def check(operation: str, n: int) -> None:
    if operation not in OPERATIONS or n < 2:
        raise UserError(f"There are bounds for {', '.join(OPERATIONS)} on at least 2 items, not {operation} on {n}.")


# --- the table ---------------------------------------------------------------------------------------------------


def table(sizes: Sequence[int] = (3, 4, 6), steps: Sequence[int] = (1, 2, 3)) -> str:
    """The bounds as a Markdown table: C(Y | X) and accuracies in per cent."""
    head = ["operation", "n", "C(Y\\|X), nats", *(f"{k} a step" for k in steps), "all at once"]
    rows = [head, ["---", *["--:"] * (len(head) - 1)]]
    rows.append(["copy and all others with one answer", "any", "0", *["100"] * (len(steps) + 1)])
    for operation in ("remove_random", "replace_random", "shuffle", "insert_random"):
        for n in sizes:
            values = [*(accuracy(operation, n, k) for k in steps), full_parallel_accuracy(operation, n)]
            rows.append([operation, str(n), f"{correlation(operation, n):.3f}", *(f"{100 * v:.1f}" for v in values)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table())
