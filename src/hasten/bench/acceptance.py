"""What a trained drafter is worth on Spec-Bench, category by category, for the card beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hasten.bench.compare import compare
from hasten.bench.prompts import BenchPrompt, limited
from hasten.bench.published import spec_bench
from hasten.engine import SamplingParams
from hasten.llm import LLM

QUESTIONS = 4
"""Of each category, evenly chosen."""
TOKENS = 96
"""New tokens of each answer at most."""
KEPT = ("category", "questions", "tokens_per_step", "acceptance_by_depth", "identical", "prompts")
"""Of a row of `hasten bench`, what does not depend on the machine."""


Questions = list[BenchPrompt]


def chosen(file: Path) -> Questions:
    """The questions of Spec-Bench's file that cards are of.

    Raises:
        UserError: it cannot be read, or is another file.
    """
    return limited(spec_bench(file), QUESTIONS)


def acceptance(
    llm: LLM, method: str, prompts: Questions, report: Callable[[int], None] = lambda done: None
) -> list[dict[str, Any]]:
    """Greedy drafts of a method beside plain decoding: a row per category, and `overall`.

    Args:
        method: its specification; where drafts are cut to what pays, the figures are this machine's.

    Returns:
        Of each row `KEPT`, as docs/benchmarks.md explains them.

    Raises:
        UserError: unknown method, a prompt that is too long.
    """
    rows = compare(llm, [method], prompts, SamplingParams(max_tokens=TOKENS), report=report)
    return [{key: row[key] for key in KEPT} for row in rows if row["method"] == method]
