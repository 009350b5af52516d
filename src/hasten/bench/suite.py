"""Prompts to measure on: the shipped tasks (held-out split), or a JSONL file of the user's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hasten.errors import UserError
from hasten.tasks import CATEGORIES, TASKS, examples

SEED = 20_26


@dataclass(frozen=True)
class BenchPrompt:
    """A prompt, the category it is reported under, and a grader where the right answer is known."""

    category: str
    task: str
    prompt: str
    grade: Callable[[str], bool] | None


def load_suite(name: str, per_task: int) -> list[BenchPrompt]:
    """`tasks` (all of them), one category, one task, or a file of prompts.

    Args:
        name: which.
        per_task: held-out examples of each task; ignored for files.

    Raises:
        UserError: nothing of that name.
    """
    if name.endswith((".jsonl", ".json", ".txt")) or Path(name).is_file():
        return load_prompts(Path(name))
    names = [task for task, generator in TASKS.items() if name in ("tasks", task, generator.category)]
    if not names:
        known = ", ".join(["tasks", *CATEGORIES, *TASKS])
        raise UserError(f"unknown suite {name!r}: give a file of prompts or one of {known}")
    prompts = []
    for task in names:
        generator = TASKS[task]
        for example in examples(task, "test", per_task, SEED):
            prompts.append(
                BenchPrompt(
                    generator.category,
                    task,
                    example.prompt,
                    lambda output, g=generator, e=example: g.grade(e, output),  # type: ignore[misc]
                )
            )
    return prompts


def load_prompts(path: Path) -> list[BenchPrompt]:
    """Prompts from a file: JSON lines with `prompt` (and perhaps `category`), or plain text, one prompt per line.

    Raises:
        UserError: no such file, bad JSON (with the line number), no prompts.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from {path}: {error}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix == ".txt":
            prompts.append(BenchPrompt("file", path.stem, line, None))
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        text = entry.get("prompt") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not text:
            raise UserError(f"{path}, line {number}: every line needs a non-empty string under 'prompt'")
        prompts.append(BenchPrompt(str(entry.get("category", "file")), path.stem, text, None))
    if not prompts:
        raise UserError(f"{path} has no prompts")
    return prompts
