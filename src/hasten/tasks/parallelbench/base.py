"""What a question of ParallelBench is, how a task makes them, and the fixed sets that are scored."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from hasten.errors import UserError

from ..base import PROMPT_END, Split, split_of

# So many draws without a new question mean that there are no more.
PATIENCE = 5000


@dataclass(frozen=True)
class Question(ABC):
    """One question and one of its valid answers. `example` is an answered question shown before it."""

    task: str
    prompt: str
    answer: str
    example: tuple[str, str] | None = field(default=None, kw_only=True)

    @abstractmethod
    def grade(self, text: str, strict: bool = False) -> float:
        """The score of an output, from 0 to 1. Strict reading wants the form that was asked for and no more."""

    @abstractmethod
    def draw(self, rng: random.Random) -> str:
        """A valid answer, drawn anew: whoever trains on one fixed answer a question learns no dependency."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns of a chat, as chat templates take them: the example, then the question."""
        contents = [*(self.example or ()), self.prompt]
        return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]

    @property
    def text(self) -> str:
        """The same as one text, for models without a chat template."""
        shown = f"{self.example[0]}{PROMPT_END} {self.example[1]}\n\n" if self.example else ""
        return shown + self.prompt + PROMPT_END


@dataclass(frozen=True)
class BenchTask(ABC):
    """A family of questions: `per_size` of each of its sizes make its set."""

    name: str
    sizes: tuple[int, ...]
    per_size: int

    def generate(self, rng: random.Random, size: int | None = None) -> Question:
        """Draw one question, of the given size or one of the task's, with its example if the task shows one."""
        size = rng.choice(self.sizes) if size is None else size
        return self.with_example(rng, self.ask(rng, size), size)

    def with_example(self, rng: random.Random, question: Question, size: int) -> Question:
        """The question with another one shown before it, if the task shows one: never one of a test's."""
        other = self.example_size(rng, size)
        if other is None:
            return question
        shown = self.ask(rng, other)
        while shown.prompt == question.prompt or split_of(shown.text) == "test":
            shown = self.ask(rng, other)
        return replace(question, example=(shown.prompt, shown.answer))

    @abstractmethod
    def ask(self, rng: random.Random, size: int) -> Question:
        """Draw one question without an example."""

    def example_size(self, rng: random.Random, size: int) -> int | None:
        """The size of the example shown before a question of `size`; None shows none."""
        return None


def questions(task: BenchTask, split: Split = "test", seed: int | str = 0) -> Iterator[Question]:
    """The set of a task, ordered by size, without repeated prompts: the same arguments, the same questions.

    Raises:
        UserError: the task has too few different questions.
    """
    rng = random.Random(f"parallelbench/{task.name}/{split}/{seed}")
    seen: set[str] = set()
    for size in task.sizes:
        for _ in range(task.per_size):
            for _ in range(PATIENCE):
                question = task.ask(rng, size)
                # As the text that is read: questions on words are ones that training asks, too.
                if split_of(question.text) == split and question.prompt not in seen:
                    break
            else:
                raise UserError(f"{task.name}: too few different questions of size {size} for {task.per_size} of them.")
            seen.add(question.prompt)
            yield task.with_example(rng, question, size)


def score(asked: Sequence[Question], outputs: Sequence[str], strict: bool = False) -> float:
    """The mean grade of the outputs, from 0 to 100."""
    grades = [question.grade(output, strict) for question, output in zip(asked, outputs, strict=True)]
    return 100 * sum(grades) / len(grades)
