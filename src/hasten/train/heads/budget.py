"""A run that fits into so many minutes: fewer dialogues, and fewer rows of them."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import islice
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from hasten.documents import dumps
from hasten.errors import UserError
from hasten.files import make_folder, write_text
from hasten.model.checkpoint import read_json
from hasten.train import processes
from hasten.train.recipe import AnyRecipe
from hasten.train.trainer import Trainer

FILE = "budget.json"
"""In the folder of a run that was cut: how many tokens it has, so that it goes on as it began."""
TALKING, TRAINING = 0.4, 0.35
"""Shares of the time: what dialogues may take, and what training has however long everything before took."""
TRIAL = 3
"""Steps that are timed."""

SomeRecipe = TypeVar("SomeRecipe", bound=AnyRecipe)


class Budget:
    """The time of a command, which begins now.

    Args:
        minutes: that it may take.
        folder: of the run. One that was interrupted as it trained there goes on with what it had.

    Raises:
        UserError: not positive and finite.
    """

    def __init__(self, minutes: float, folder: Path) -> None:
        if not 0 < minutes < inf:
            raise UserError(f"budget must be minutes, positive and finite, not {minutes}")
        self.seconds, self.folder = 60.0 * minutes, folder
        self._began = time.monotonic()

    @property
    def talked(self) -> bool:
        """Whether there is no more time for dialogues."""
        return (self.folder / FILE).exists() or time.monotonic() - self._began >= TALKING * self.seconds

    def cut(self, recipe: SomeRecipe) -> SomeRecipe:
        """A recipe with as many tokens as there is time for, its own at most."""
        make_folder(self.folder)
        file = self.folder / FILE
        # All processes are asked before one writes it: each takes part in the trial, or none.
        if not all(processes.told(file.exists())):
            left = max(self.seconds - (time.monotonic() - self._began), TRAINING * self.seconds)
            tokens = min(recipe.tokens, max(recipe.batch_tokens, int(left * tokens_per_second(recipe))))
            with processes.first_alone():
                if processes.first():
                    write_text(file, dumps({"tokens": tokens}) + "\n")
        return replace(recipe, tokens=read_json(file)["tokens"])


def tokens_per_second(recipe: AnyRecipe) -> float:
    """How fast a recipe runs here: the first steps of a run that is thrown away."""
    with TemporaryDirectory() as scratch:
        recipe.prepare(Path(scratch))
        trainer = Trainer(recipe, Path(scratch))
        # Midway: some begin with steps that cost less.
        trainer.tokens = recipe.tokens // 2
        batches = trainer.batches()
        # The first one warms up.
        trainer.step(next(batches))
        tokens, began = trainer.tokens, time.perf_counter()
        for step in islice(batches, TRIAL):
            trainer.step(step)
        return (trainer.tokens - tokens) / (time.perf_counter() - began)
