"""ParallelBench (2510.04767) as suites: its questions as prompts, on names or on the words of a model's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hasten.bench.prompts import MAX_TOKENS, BenchPrompt, spread
from hasten.errors import UserError
from hasten.tasks.parallelbench import (
    OPERATIONS,
    PARALLELBENCH,
    PARALLELBENCH_N15,
    SEVERAL_ANSWERS,
    BenchTask,
    puzzle_tasks,
    questions,
    word_tasks,
    writing_tasks,
)
from hasten.tasks.words import ALL_WORDS

SUITES = ("parallelbench", "parallelbench-n15", "parallelbench-words")
GROUPS: dict[str, tuple[str, ...]] = {
    "lists": OPERATIONS,
    "random": tuple(name for name in OPERATIONS if name in SEVERAL_ANSWERS),
    "writing": tuple(writing_tasks()),
    "puzzles": tuple(puzzle_tasks()),
}
"""Parts of the suites by name; `random` are the operations with several right answers."""
FEW_WORDS = 32
"""If fewer of the tasks' own words are one token each, all of a tokenizer's lower-case words are taken."""
SMALLEST_CANVAS = 8


def is_parallelbench(name: str) -> bool:
    """Whether a suite's name is one of these, a part of it or not."""
    return name.partition(":")[0] in SUITES


def parallelbench(name: str, per_task: int, tokenizer: Any = None) -> list[BenchPrompt]:
    """Prompts of `parallelbench`, `parallelbench-n15`, `parallelbench-words`, or of parts of one: `SUITE:part,part`.

    A task's prompts are spread evenly over its sizes. The budget of each is what the task's longest answer needs, with
    an end, rounded up to a power of two: a canvas says nothing of the length of an answer.

    Args:
        per_task: at most as many as the task has.
        tokenizer: whose words and tokens; None takes the tasks' own words, and leaves budgets as they are.

    Raises:
        UserError: no such part; too few words.
    """
    suite, _, parts = name.partition(":")
    tasks = _tasks(suite, tokenizer)
    chosen = [task for part in parts.split(",") for task in _part(tasks, part.strip(), suite)] if parts else list(tasks)
    return [prompt for task in dict.fromkeys(chosen) for prompt in _prompts(tasks[task], per_task, tokenizer)]


def single_token_words(tokenizer: Any) -> list[str]:
    """Words that are one token with the space before them: the tasks' own, or any if the tokenizer has few of these."""
    spaced = {token[1:] for token in tokenizer.get_vocab() if token[:1] in ("Ġ", "▁")}
    own = [word for word in ALL_WORDS if word in spaced]
    if len(own) >= FEW_WORDS:
        return own
    return sorted(word for word in spaced if len(word) > 1 and word.isascii() and word.isalpha() and word.islower())


def _tasks(suite: str, tokenizer: Any) -> dict[str, BenchTask]:
    """All tasks of a suite by the operation's or task's own name."""
    if suite == "parallelbench":
        return PARALLELBENCH
    if suite == "parallelbench-n15":
        return {operation: PARALLELBENCH_N15[f"{operation}_n15"] for operation in OPERATIONS}
    words: Sequence[str] = ALL_WORDS if tokenizer is None else single_token_words(tokenizer)
    tasks = word_tasks(words)
    longest = max(size for task in tasks.values() for size in task.sizes) + 1
    if len(words) <= longest:
        raise UserError(f"{suite} needs {longest + 1} words of one token each, and this tokenizer has {len(words)}")
    return tasks


def _part(tasks: dict[str, BenchTask], part: str, suite: str) -> list[str]:
    """The tasks of a group, or the one of that name."""
    found = [task for task in GROUPS.get(part, (part,)) if task in tasks]
    if not found:
        groups = [group for group, members in GROUPS.items() if set(members) & set(tasks)]
        raise UserError(f"{suite} has no part {part!r}; its parts are: {', '.join([*groups, *tasks])}")
    return found


def _prompts(task: BenchTask, per_task: int, tokenizer: Any) -> list[BenchPrompt]:
    """Questions of one task, spread over its fixed set."""
    everything = list(questions(task))
    budget = MAX_TOKENS
    if tokenizer is not None:
        texts = [f" {question.answer}" for question in everything]
        longest = max(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
        budget = max(SMALLEST_CANVAS, 1 << longest.bit_length())
    return [
        BenchPrompt(task.name, task.name, asked.text, asked.grade, question=asked, max_tokens=budget)
        for asked in spread(everything, per_task)
    ]
