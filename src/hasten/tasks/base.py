"""What a task is, how its examples are split into training and test, and the registry of all tasks."""

from __future__ import annotations

import difflib
import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

Split = Literal["train", "test"]

CATEGORIES = ("arithmetic", "lists", "retrieval", "edit", "sql", "json", "code", "puzzles", "tagging")

PROMPT_END = "\nAnswer:"
TEST_SHARE = 16  # one prompt in so many belongs to the test split


@dataclass(frozen=True)
class Example:
    """One question. The model reads `prompt` and should write `answer`, then end-of-text."""

    task: str
    prompt: str
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict)


class Task(ABC):
    """A family of questions with a generator and a grader."""

    name: ClassVar[str]
    category: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def generate(self, rng: random.Random, difficulty: float) -> Example:
        """Draw one example. A difficulty of 1 covers all sizes evenly; a smaller one caps the size."""

    def grade(self, example: Example, output: str) -> bool:
        """Whether `output` answers the example. Tasks with several right answers override this."""
        return output.strip() == example.answer.strip()

    def example(self, question: str, answer: str, **meta: Any) -> Example:
        """Build an example of this task. An answer of one line follows a space, a longer one a new line."""
        start = "\n" if "\n" in answer else " "
        return Example(self.name, question + PROMPT_END, start + answer, meta)


TASKS: dict[str, Task] = {}


def register(cls: type[Task]) -> type[Task]:
    """Class decorator: add one instance of the task to `TASKS`."""
    if cls.name in TASKS:
        raise ValueError(f"There is already a task named {cls.name!r}.")
    if cls.category not in CATEGORIES:
        raise ValueError(f"Task {cls.name!r} has the unknown category {cls.category!r}.")
    TASKS[cls.name] = cls()
    return cls


def get_task(name: str) -> Task:
    """The task of that name, or an error that names the nearest ones."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.4) or sorted(TASKS)
    raise ValueError(f"There is no task named {name!r}; did you mean {', '.join(near)}?")


def pick_size(rng: random.Random, low: int, high: int, difficulty: float) -> int:
    """A size drawn evenly from `low` to the part of `high` that the difficulty allows."""
    return rng.randint(low, min(high, max(low + 1, round(high * difficulty))))


def split_of(prompt: str) -> Split:
    """The split a prompt belongs to: a property of its text alone, so no prompt is ever in both."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return "test" if digest[0] % TEST_SHARE == 0 else "train"


def examples(task_name: str, split: Split, count: int, seed: int | str, difficulty: float = 1.0) -> Iterator[Example]:
    """Yield `count` examples of one split. The same arguments give the same examples on every machine."""
    task = get_task(task_name)
    if split not in get_args(Split):
        raise ValueError(f"The split must be 'train' or 'test', not {split!r}.")
    if not 0 < difficulty <= 1:
        raise ValueError(f"The difficulty must be above 0 and at most 1, not {difficulty}.")
    return _draw(task, split, count, random.Random(f"{task_name}/{split}/{seed}"), difficulty)


def _draw(task: Task, split: Split, count: int, rng: random.Random, difficulty: float) -> Iterator[Example]:
    # Not in `examples` itself, so that wrong arguments fail at the call and not at the first `next`.
    drawn = 0
    while drawn < count:
        example = task.generate(rng, difficulty)
        if split_of(example.prompt) == split:
            drawn += 1
            yield example
