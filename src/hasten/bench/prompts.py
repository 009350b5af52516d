"""Prompts to measure on: how one is held, read from a file, and how few of many are chosen."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from hasten.engine import SamplingParams
from hasten.errors import UserError
from hasten.files import json_line
from hasten.tasks.parallelbench import Question

MAX_TOKENS = 256
FILES = (".jsonl", ".json", ".txt", ".gz")
"""How the names of files of prompts end."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class BenchPrompt:
    """A prompt, the category it is reported under, and a grader where the right answer is known.

    `turns` are the user's turns of a conversation so far, this one (`prompt`) included; the answers between them are
    the model's own. Empty for a prompt that is taken as it stands. The prompts of a conversation follow each other.

    Attributes:
        grade: from an output to its score, 0 to 1 (or false and true).
        question: ParallelBench's, whose messages a chat template gets instead of `prompt`.
        max_tokens: new tokens, and the size of a canvas, where nothing else is asked for.
    """

    category: str
    task: str
    prompt: str
    grade: Callable[[str], float] | None
    turns: tuple[str, ...] = ()
    question: Question | None = None
    max_tokens: int = MAX_TOKENS

    @property
    def opens(self) -> bool:
        """Whether a question begins with it: the first turn of a conversation, or a prompt that stands alone."""
        return len(self.turns) < 2

    def within(self, params: SamplingParams) -> SamplingParams:
        """These parameters, with the prompt's own budget if they have none."""
        return params if params.max_tokens is not None else replace(params, max_tokens=self.max_tokens)


def load_prompts(path: Path) -> list[BenchPrompt]:
    """Prompts from a file: plain text (`.txt`), one prompt per line, or JSON lines; either may be packed (`.gz`).

    A line of JSON has `prompt`, a text that is taken as it stands, or `turns`, the user's texts of a conversation,
    which give one prompt each; and perhaps `category`.

    Raises:
        UserError: no such file, bad JSON (with the line number), no prompts.
    """
    packed = path.suffix == ".gz"
    text = (path.with_suffix("") if packed else path).suffix == ".txt"
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            # Other line ends, such as U+2028, may stand within a string.
            lines = file.read().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read prompts from {path}: {error}") from error
    prompts: list[BenchPrompt] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if text:
            prompts.append(BenchPrompt("file", path.stem, line.removesuffix("\n"), None))
            continue
        prompts += _entry(json_line(path, number, line), path, number)
    if not prompts:
        raise UserError(f"{path} has no prompts")
    return prompts


def _entry(entry: Any, path: Path, number: int) -> list[BenchPrompt]:
    """The prompts of one line of JSON."""
    if not isinstance(entry, dict):
        entry = {}
    # What a terminal takes for a command is no name.
    category = "".join(each if each.isprintable() else "�" for each in str(entry.get("category", "file")))
    if "turns" in entry:
        turns = entry["turns"]
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
            raise UserError(f"{path}, line {number}: 'turns' must be a list of non-empty strings")
        return [
            BenchPrompt(category, path.stem, turn, None, tuple(turns[: place + 1])) for place, turn in enumerate(turns)
        ]
    text = entry.get("prompt")
    if not isinstance(text, str) or not text:
        raise UserError(f"{path}, line {number}: every line needs a non-empty string under 'prompt', or 'turns'")
    return [BenchPrompt(category, path.stem, text, None)]


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """So many of the items, or all there are, evenly over the whole."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def limited(prompts: Sequence[BenchPrompt], count: int) -> list[BenchPrompt]:
    """At most so many questions of each category, with all their turns, evenly over those that there are."""
    categories: dict[str, list[list[BenchPrompt]]] = {}
    for prompt in prompts:
        questions = categories.setdefault(prompt.category, [])
        if prompt.opens or not questions:
            questions.append([])
        questions[-1].append(prompt)
    return [turn for questions in categories.values() for question in spread(questions, count) for turn in question]
