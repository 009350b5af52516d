"""What commands that train a model share: the run, its card, and what is said in the end."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hasten.cli import options

if TYPE_CHECKING:
    from hasten.train.recipe import Recipe

WriteCard = Callable[[Path, dict[str, Any], str, int, Callable[[int], None]], Path]
"""Folder, summary, command, held-out examples of each task, and what is told of each task that was decoded."""


def run(
    recipe: Recipe,
    output: Path,
    write_card: WriteCard,
    decodings: int,
    resume: bool,
    per_task: int,
    threads: int,
    json: bool,
    data: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Train, score, and say where the model is.

    Args:
        decodings: how often the card has all tasks decoded.
        data: what the summary says of the data.
    """
    from hasten.tasks import TASKS
    from hasten.train.trainer import train

    options.set_threads(threads)
    summary = {**train(recipe, output, resume), **data}
    command = shlex.join(["hasten", *sys.argv[1:]])
    with options.progress("scoring", decodings * len(TASKS), quiet=json) as advance:
        card = write_card(output, summary, command, per_task, advance)
    if json:
        options.emit({"output": str(output), "card": str(card), **summary})
    else:
        print(f"{output}: {summary['parameters']:,} parameters, loss {summary['loss']}; card: {card}")
