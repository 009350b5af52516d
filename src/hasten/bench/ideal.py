"""The ideal model of ParallelBench's list operations, decoded by real decoders; and how often it is right by theory.

It knows all right answers of a question and predicts the exact marginals of masked positions (`list_oracle`). So what a
decoder gets wrong with it is the decoder's own doing. Its canvas is the answer, an item per position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hasten.bench.prompts import BenchPrompt
from hasten.engine import Engine, Request, SamplingParams
from hasten.errors import UserError
from hasten.model import CanvasOracle, DiffusionConfig
from hasten.tasks.parallelbench import CountingOracle, ListProblem, ListQuestion, list_oracle
from hasten.tasks.parallelbench.theory import accuracy, random_order_accuracy

COUNTED = 6
"""Lists up to this long have few enough orders to count them without the one that was given: no answer to `shuffle`."""
LEAST = 1e-30
"""Stands for a probability of 0: logits stay finite."""


class IdealModel:
    """One question's ideal model, ready to be decoded.

    Raises:
        UserError: not a question about a list.
    """

    def __init__(self, prompt: BenchPrompt) -> None:
        question = prompt.question
        if not isinstance(question, ListQuestion):
            raise UserError(
                "the oracle knows ParallelBench's list operations: choose them, such as parallelbench:lists"
            )
        self.question, problem = question, question.problem
        self.items = [*problem.items, *([] if problem.word is None else [problem.word])]
        self.length = problem.length
        mask = len(self.items)
        answers = _counted(problem)
        numbers = {item: number for number, item in enumerate(self.items)}
        if answers is None:
            oracle = list_oracle(problem, mask + 1, numbers.__getitem__)
        else:
            oracle = CountingOracle([[numbers[item] for item in answer] for answer in answers], mask + 1)

        @lru_cache(maxsize=64)
        def predictions(seen: tuple[tuple[int, int], ...]) -> Tensor:
            ids = np.array([token for _, token in seen[1:]])
            return torch.from_numpy(np.log(np.maximum(oracle.marginals(ids, ids == mask), LEAST))).float()

        # Position 0 is the prompt, of one token that says nothing.
        law = lambda seen, position: predictions(seen)[position - 1]  # noqa: E731
        config = DiffusionConfig("full", "same", mask)
        self.engine = Engine(CanvasOracle(law, mask + 1, config, max_positions=self.length + 1))

    def decode(self, method: str, params: SamplingParams) -> tuple[Request, float]:
        """The finished request, and the answer's grade.

        Raises:
            UserError: unknown method, or one that does not fit.
        """
        (request,) = self.engine.add([0], params, method)
        for _ in self.engine.run():
            pass
        return request, float(self.question.right([self.items[token] for token in request.output]))


def _counted(problem: ListProblem[str]) -> list[tuple[str, ...]] | None:
    """The right answers, each once; None where they are too many."""
    if problem.operation != "shuffle":
        return problem.answers()
    if len(problem.items) > COUNTED:
        return None
    return [order for order in problem.answers() if order != problem.items]


def ideal_points(prompts: Sequence[BenchPrompt]) -> list[dict[str, float | str]]:
    """Accuracy of the ideal model by tokens per step: one token per item, in random order, at temperature 1.

    One point per category and number of positions filled in a step (`per_step`), over the sizes that the prompts have.
    """
    lengths: dict[str, list[ListQuestion]] = {}
    for prompt in prompts:
        if isinstance(prompt.question, ListQuestion):
            lengths.setdefault(prompt.category, []).append(prompt.question)
    points: list[dict[str, float | str]] = []
    for category, asked in lengths.items():
        problems = [question.problem for question in asked]
        for per_step in range(1, max(problem.length for problem in problems) + 1):
            steps = sum(math.ceil(problem.length / per_step) for problem in problems)
            right = sum(_accuracy(problem.operation, len(problem.items), per_step) for problem in problems)
            points.append(
                {
                    "category": category,
                    "per_step": per_step,
                    "tokens_per_step": round(sum(problem.length for problem in problems) / steps, 4),
                    "accuracy": round(right / len(problems), 4),
                }
            )
    return points


@lru_cache(maxsize=1024)
def _accuracy(operation: str, size: int, per_step: int) -> float:
    """How likely one problem is solved.

    `shuffle` may not give back the list: counted for short lists, negligible for long ones.
    """
    if per_step == 1:
        return 1.0
    if operation == "shuffle" and size <= COUNTED:
        answers = _counted(ListProblem("shuffle", tuple(map(str, range(size)))))
        assert answers is not None
        return random_order_accuracy(answers, min(per_step, size))
    return accuracy(operation, size, per_step)
