"""The training stream: a weighted mixture of tasks and prose, packed by length into batches of equal token count.

Everything is a function of (seed, pool number), so a run that resumes sees the very batches it would have seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from hasten.errors import UserError
from hasten.tasks import TASKS, Example, examples, prose_chunks, split_of

PROSE = "prose"
IGNORE = -100
COPYING = ("copy", "reverse", "insert", "remove", "replace", "lookup")
"""What a run opens with: these alone, and short, let an induction head form; the full mixture delays it for long."""
SHORTEST_PROSE = 96
"""Tokens of a piece of prose when the curriculum begins."""
POOL_BATCHES = 64
"""Documents of this many batches are drawn together and sorted by length, which leaves little padding."""
PATIENCE = 100
"""Examples of a task that are drawn before another task is, where answers must be short; and tasks drawn at most."""

DEFAULT_WEIGHTS: dict[str, float] = {
    "addition": 1.7, "subtraction": 1.7, "multiplication": 1.7,
    "copy": 0.8, "reverse": 1.2, "sort": 1.6, "insert": 1.4, "remove": 1.4, "replace": 1.2, "shuffle": 0.3,
    "lookup": 2.0, "multihop": 1.2, "needle": 1.4, "edit": 2.0, "sql": 1.5, "json": 1.5, "python": 0.8,
    "sudoku4": 0.4, "latin": 0.4, "bio": 0.7, PROSE: 0.8,
}  # fmt: skip
"""Expected share of *documents*; found by watching which tasks lag."""


@dataclass(frozen=True)
class Document:
    """Token ids of one document; the loss starts at `answer` (0 for prose: every token counts)."""

    ids: list[int]
    answer: int

    @classmethod
    def of(cls, example: Example, encode: Callable[[str], list[int]], end: int) -> Document:
        """Prompt, answer and end of an example."""
        prompt = encode(example.prompt)
        return cls([*prompt, *encode(example.answer), end], len(prompt))


SomeDocument = TypeVar("SomeDocument", bound=Document)


@dataclass(frozen=True)
class Batch:
    """`ids` [rows, length] int64 padded on the right; `labels` [rows, length], -100 where no loss is taken."""

    ids: Tensor
    labels: Tensor


class Stream(Protocol):
    """Batches without end, made in pools, each a function of its number."""

    def pool(self, number: int, difficulty: float, opening: bool = False) -> list[Batch]:
        """Batches of pool `number`, in their final order; tasks, where they are drawn, are of that difficulty."""


@dataclass
class Mixture:
    """A deterministic, endless stream of batches.

    Args:
        encode: text to token ids.
        end: the end-of-text id, appended to each document.
        batch_tokens: tokens per batch, padding included; half as many in the opening, where steps count more.
        context: documents are cut to this many tokens.
        seed: of the whole stream.
        answers: the longest answer in tokens; an example with a longer one is drawn again, and a task that has only
            such ones gives way to another. 0 takes all.
        weights: relative frequency per task name, and of `"prose"`.
    """

    encode: Callable[[str], list[int]]
    end: int
    batch_tokens: int
    context: int
    seed: int
    answers: int = 0
    weights: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))

    def __post_init__(self) -> None:
        self._prose = list(prose_chunks("train")) if self.weights.get(PROSE, 0) > 0 else []

    def document(self, rng: random.Random, difficulty: float, opening: bool = False) -> Document:
        """One random document of the mixture; of its copying tasks alone in the opening.

        Raises:
            UserError: no task gives answers as short as asked.
        """
        names = [name for name in self.weights if name in COPYING] if opening else list(self.weights)
        for _ in range(PATIENCE):
            name = rng.choices(names, [self.weights[name] for name in names])[0]
            if name == PROSE:
                length = max(SHORTEST_PROSE, int(self.context * difficulty))
                return Document([*self.encode(rng.choice(self._prose)), self.end][:length], 0)
            for _ in range(PATIENCE):
                example = TASKS[name].generate(rng, difficulty)
                document = Document.of(example, self.encode, self.end)
                length = len(document.ids) - document.answer - 1
                if split_of(example.prompt) == "train" and length <= (self.answers or length):
                    return Document(document.ids[: self.context], document.answer)
        raise UserError(f"no task of the mixture has answers of at most {self.answers} tokens")

    def pool(self, number: int, difficulty: float, opening: bool = False) -> list[Batch]:
        """Batches number `POOL_BATCHES * number` onwards, in their final order."""
        rng = random.Random(f"{self.seed}/{number}")
        documents: list[Document] = []
        batch_tokens = self.batch_tokens // 2 if opening else self.batch_tokens
        budget = POOL_BATCHES * batch_tokens
        while budget > 0:
            documents.append(self.document(rng, difficulty, opening))
            budget -= len(documents[-1].ids)
        return batches(documents, batch_tokens, self.end, rng)


@dataclass
class Passes:
    """The same documents again and again; a pool is one pass over all of them, in an order of its own.

    Args:
        documents: at least one.
        end: the end-of-text id, for padding.
        batch_tokens: tokens per batch, padding included.
        seed: of the orders.
    """

    documents: Sequence[Document]
    end: int
    batch_tokens: int
    seed: int

    def pool(self, number: int, difficulty: float, opening: bool = False) -> list[Batch]:
        """All documents; they have the length they have."""
        rng = random.Random(f"{self.seed}/{number}")
        return batches(rng.sample(self.documents, len(self.documents)), self.batch_tokens, self.end, rng)


def training_examples(
    count: int, seed: int | str, difficulty: float = 1.0, fits: Callable[[Example], bool] = lambda example: True
) -> Iterator[Example]:
    """So many examples of the training split that fit, all tasks in turn; fewer where hardly any fits.

    The first ones are the same, however many are asked for.
    """
    tasks = (examples(name, "train", count, seed, difficulty) for name in sorted(TASKS))
    in_turn = chain.from_iterable(zip(*tasks, strict=True))
    return islice(filter(fits, in_turn), count)


def batches(documents: Sequence[Document], batch_tokens: int, end: int, rng: random.Random) -> list[Batch]:
    """Documents of like length side by side, the batches in random order."""
    by_length = sorted(documents, key=lambda document: len(document.ids))
    made = [pad(rows, end) for rows in group(by_length, batch_tokens)]
    rng.shuffle(made)
    return made


def group(documents: Sequence[SomeDocument], batch_tokens: int) -> Iterator[list[SomeDocument]]:
    """Cut a list sorted by length where `rows * longest` would pass the budget."""
    rows: list[SomeDocument] = []
    for document in documents:
        if rows and (len(rows) + 1) * len(document.ids) > batch_tokens:
            yield rows
            rows = []
        rows.append(document)
    yield rows


def pad(rows: Sequence[Document], end: int) -> Batch:
    """Documents side by side, padded on the right with the end token, which is not labelled there."""
    length = max(len(document.ids) for document in rows)
    ids = torch.full((len(rows), length), end, dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORE, dtype=torch.int64)
    for row, document in enumerate(rows):
        count = len(document.ids)
        ids[row, :count] = torch.tensor(document.ids)
        labels[row, document.answer : count] = ids[row, document.answer : count]
    return Batch(ids, labels)
