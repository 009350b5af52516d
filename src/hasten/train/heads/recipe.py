"""What training runs of all heads have in common: whole dialogues in random order, AdamW, some held out."""

from __future__ import annotations

import hashlib
import os
import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from hasten.documents import dumps
from hasten.errors import UserError
from hasten.files import write_text
from hasten.methods.drafters.vocabtrim import most_frequent
from hasten.methods.heads.files import CONFIG, read_config
from hasten.methods.heads.shipped import FINGERPRINT
from hasten.model import Decoder, load_model
from hasten.model.checkpoint import resolve
from hasten.train.heads.dialogues import Dialogue, read_dialogues
from hasten.train.heads.states import States, open_states
from hasten.train.recipe import Network, Schedule

DIALOGUES = "dialogues.jsonl"
HELD_OUT = 16
"""One dialogue of so many is held out, by what its prompt says."""


@dataclass(frozen=True)
class HeadBatch:
    """Rows of whole dialogues, one behind the other.

    Attributes:
        ids: int64 [rows].
        answers: bool [rows]: tokens of answers.
        dialogue: int64 [rows], the number of the dialogue.
        states: float32 [rows, taps, hidden].
    """

    ids: Tensor
    answers: Tensor
    dialogue: Tensor
    states: Tensor

    def ahead(self, distance: int) -> Tensor:
        """int64 [n]: rows from which a head drafts what comes so many tokens later, and which is the model's own.

        Those are the rows from the last one of the prompt on.
        """
        rows = torch.arange(len(self.ids) - distance)
        later = rows + distance
        same = self.dialogue[rows] == self.dialogue[later]
        return rows[same & self.answers[rows + 1] & self.answers[later]]


def is_held_out(dialogue: Dialogue) -> bool:
    """Whether a dialogue is for measuring only; one of the same prompt always is, too."""
    return hashlib.sha256(repr(dialogue.prompt).encode()).digest()[0] % HELD_OUT == 0


def packed(numbers: Sequence[int], length: Callable[[int], int], rows: int) -> Iterator[list[int]]:
    """Dialogues in this order, in groups of so many rows at most, but of at least one dialogue."""
    some: list[int] = []
    count = 0
    for number in numbers:
        if some and count + length(number) > rows:
            yield some
            some, count = [], 0
        some.append(number)
        count += length(number)
    if some:
        yield some


class Dialogues:
    """Dialogues with their hidden states, and which of them are held out."""

    def __init__(self, folder: Path, states: str) -> None:
        dialogues = read_dialogues(folder / DIALOGUES)
        self.states: States = open_states(folder / states, dialogues)
        kept = range(len(self.states))
        self.held_out = [number for number in kept if is_held_out(dialogues[number])]
        self.trained = [number for number in kept if not is_held_out(dialogues[number])]
        if not self.held_out or not self.trained:
            raise UserError(f"{folder} has too few dialogues to train on some and measure on others")

    def batches(self, numbers: Sequence[int], rows: int) -> Iterator[HeadBatch]:
        """Dialogues in this order, so many rows at a time, but at least one dialogue."""
        return map(self.batch, self.packed(numbers, rows))

    def packed(self, numbers: Sequence[int], rows: int) -> Iterator[list[int]]:
        """Which dialogues stand in each of these batches."""
        bounds = self.states.bounds
        return packed(numbers, lambda number: bounds[number + 1] - bounds[number], rows)

    def batch(self, numbers: Sequence[int]) -> HeadBatch:
        """The rows of some dialogues, read from the file."""
        spans = [slice(self.states.bounds[number], self.states.bounds[number + 1]) for number in numbers]
        return HeadBatch(
            torch.cat([self.states.tokens[span] for span in spans]),
            torch.cat([self.states.answers[span] for span in spans]),
            torch.cat([torch.full((span.stop - span.start,), place) for place, span in enumerate(spans)]),
            torch.cat([self.states[span] for span in spans]).float(),
        )

    def words(self, count: int, vocabulary: int) -> Tensor | None:
        """int64, ascending: the tokens that answers say most often; None where that is all of them, or 0."""
        if not 0 < count < vocabulary:
            return None
        said = Counter(self.states.tokens[self.states.answers].tolist())
        return torch.tensor(sorted(most_frequent(said, count, vocabulary)))


@dataclass(frozen=True)
class Epoch(Sequence[HeadBatch]):
    """All batches of a pass over the dialogues. Each is read when it is asked for: together they are the whole file."""

    dialogues: Dialogues
    packed: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.packed)

    @overload
    def __getitem__(self, place: int) -> HeadBatch: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[HeadBatch]: ...
    def __getitem__(self, place: int | slice) -> HeadBatch | Sequence[HeadBatch]:
        if isinstance(place, slice):
            return Epoch(self.dialogues, self.packed[place])
        return self.dialogues.batch(self.packed[place])


def write_card(
    folder: Path, target: str, summary: Mapping[str, Any], dialogues: int, command: str, measured: Mapping[str, Any]
) -> None:
    """Add to a head's configuration whose it is, and how it was made: `fingerprint` and `training`.

    Args:
        target: fingerprint of the model that it was trained for.
        summary: of the run.
        dialogues: that it was made on, those held out included.
        measured: fields that say what it is worth beside `accuracy`.

    Raises:
        UserError: it cannot be written.
    """
    # Where things lay is nothing to whoever gets the head.
    config = {
        name: Path(value).name if name in ("parent", "data") else value for name, value in summary["config"].items()
    }
    machine = f"{os.cpu_count()} x {torch.backends.cpu.get_cpu_capability()}"
    made = {**summary, "config": config, "dialogues": dialogues, "command": command, "machine": machine}
    card = {**read_config(folder), **measured, FINGERPRINT: target, "training": made}
    write_text(folder / CONFIG, dumps(card, indent=2) + "\n")


@dataclass(frozen=True)
class HeadRecipe(Schedule[Network, Dialogues, HeadBatch]):
    """A run on a folder of dialogues and hidden states.

    Attributes:
        parent: the target.
        data: the folder.
        words: tokens that the heads may say, the most frequent of answers; 0 for all.
    """

    parent: str = ""
    data: str = ""
    words: int = 0

    states: ClassVar[str]
    """The file of hidden states in the folder."""

    @abstractmethod
    def build(self, target: Decoder, dialogues: Dialogues) -> Network:
        """The network as a run begins."""

    def prepare(self, folder: Path) -> None:
        """Nothing: the folder of dialogues is there."""

    def begin(self, folder: Path) -> tuple[Network, Dialogues]:
        torch.manual_seed(self.seed)
        dialogues = Dialogues(Path(self.data), self.states)
        return self.build(load_model(resolve(self.parent), "float32", backend="torch"), dialogues), dialogues

    def optimizers(self, model: Network) -> list[torch.optim.Optimizer]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=self.weight_decay, fused=True)]

    def pool(self, pools: Dialogues, number: int, progress: float) -> Epoch:
        order = list(pools.trained)
        random.Random((self.seed << 40) + number).shuffle(order)
        return Epoch(pools, list(pools.packed(order, self.batch_tokens)))
