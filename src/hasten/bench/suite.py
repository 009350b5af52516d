"""Suites by name: the shipped tasks (held-out split), workloads made of them, published prompts, a user's own file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hasten.bench import workloads
from hasten.bench.parallelbench import SUITES as PARALLELBENCH
from hasten.bench.parallelbench import is_parallelbench, parallelbench
from hasten.bench.prompts import FILES, BenchPrompt, load_prompts
from hasten.bench.published import PUBLISHED
from hasten.errors import UserError
from hasten.tasks import CATEGORIES, TASKS, examples

PER_TASK = 8

SUITES: dict[str, tuple[Callable[[int], list[BenchPrompt]], int]] = {
    "spec": (workloads.spec, PER_TASK),
    "redundant": (workloads.redundant, 10),
    "agent": (workloads.agent, PER_TASK),
    "prose": (workloads.prose, 16),
}
"""Workloads: what makes them, and how many prompts of each kind if nothing else is asked for."""


def load_suite(
    name: str, per_task: int | None = None, tokenizer: Any = None, file: Path | None = None
) -> list[BenchPrompt]:
    """`tasks` (all of them), a workload, one category, one task, ParallelBench or parts of it, published prompts, or a
    file of prompts.

    Args:
        name: which.
        per_task: held-out prompts of each task or kind; the suite's own number if None; ignored for files.
        tokenizer: the model's, of which ParallelBench makes words and budgets.
        file: where a suite of published prompts is.

    Raises:
        UserError: nothing of that name; a file that the suite lacks or has no use for.
    """
    if name in PUBLISHED:
        return PUBLISHED[name](file)
    if file is not None:
        raise UserError(f"suite {name!r} has prompts of its own: {file} is for one of {', '.join(PUBLISHED)}")
    if name.endswith(FILES) or Path(name).is_file():
        return load_prompts(Path(name))
    if name in SUITES:
        build, usual = SUITES[name]
        return build(usual if per_task is None else per_task)
    if is_parallelbench(name):
        return parallelbench(name, PER_TASK if per_task is None else per_task, tokenizer)
    names = [task for task, generator in TASKS.items() if name in ("tasks", task, generator.category)]
    if not names:
        known = ", ".join(["tasks", *SUITES, *PARALLELBENCH, *PUBLISHED, *CATEGORIES, *TASKS])
        raise UserError(f"unknown suite {name!r}: give a file of prompts or one of {known}")
    return [
        workloads.graded(TASKS[task].category, example)
        for task in names
        for example in examples(task, "test", PER_TASK if per_task is None else per_task, workloads.SEED)
    ]
