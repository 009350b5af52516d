"""What commands that train a model share: the run, its card, and what is said in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import options

if TYPE_CHECKING:
    from hasten.train.recipe import AnyRecipe

WriteCard = Callable[[Path, dict[str, Any], str, int, Callable[[int], None]], Path]
"""Folder, summary, command, held-out examples of each task, and what is told of each task that was decoded."""


@dataclass(frozen=True)
class Run:
    """How a recipe is run: as a command's default, an option each (`hasten.cli.groups`)."""

    resume: Annotated[bool, typer.Option(help="Continue from a checkpoint in the output folder.")] = True
    per_task: Annotated[int, typer.Option(help="Held-out examples of each task for the card.")] = 50
    threads: options.Threads = 0
    json: options.Json = False

    def train(
        self,
        recipe: AnyRecipe,
        output: Path,
        write_card: WriteCard,
        decodings: int = 1,
        data: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Train, score, and say where the model is.

        Args:
            decodings: how often the card has all tasks decoded.
            data: what the summary says of the data.
        """
        from hasten.tasks import TASKS
        from hasten.train.trainer import train

        options.set_threads(self.threads)
        summary = {**train(recipe, output, self.resume), **data}
        command = options.command_line()
        with options.progress("scoring", decodings * len(TASKS), quiet=self.json) as advance:
            card = write_card(output, summary, command, self.per_task, advance)
        if self.json:
            options.emit({"output": str(output), "card": str(card), **summary})
        else:
            print(f"{output}: {summary['parameters']:,} parameters, loss {summary['loss']}; card: {card}")
