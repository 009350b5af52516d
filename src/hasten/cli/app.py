"""The `hasten` program: its commands, and the one place where errors become a sentence and an exit status."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from hasten import __version__
from hasten.cli import (
    bench,
    chat,
    doctor,
    generate,
    methods,
    models,
    pull,
    race,
    serve,
    streams,
    sweep,
    train,
    tune,
    verify,
)  # fmt: skip
from hasten.errors import Interrupted, Notice, UserError

# Typer brings its own copy of Click; its usage errors are known by what a public one inherits from.
ClickException = typer.BadParameter.__mro__[2]


class Program(TyperGroup):
    """All commands. Typer would make a bare status, or an `Abort`, of an interruption: it is told here."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
            raise typer.Exit(_say(str(stop) or "interrupted", 128 + number)) from stop


app = typer.Typer(
    name="hasten",
    cls=Program,
    help="The same tokens, sooner: decoding accelerators for Hugging Face checkpoints.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(race.race)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(methods.methods)
app.command()(pull.pull)
app.command()(models.models)
app.command()(verify.verify)
app.command()(bench.bench)
app.command()(sweep.sweep)
app.command()(tune.tune)
app.command()(doctor.doctor)
app.add_typer(train.app, name="train")


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context,
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """The same tokens, sooner: decoding accelerators for Hugging Face checkpoints."""
    if show:
        typer.echo(f"hasten {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Run; exit 0 if all went well, 2 on bad input, 130 on Ctrl-C, 143 on SIGTERM (one sentence on stderr each)."""
    warnings.showwarning = _notice
    with streams.usable(), _terminable():
        sys.exit(_run())


def _run() -> int:
    """Run a command, and say in one sentence why it failed; the exit status."""
    try:
        status = app(standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        return _say(str(error), 2)
    except streams.Unread:
        return 0
    except Exception as error:
        if not isinstance(error, ClickException):
            raise
        return _say(" ".join(error.format_message().split()), 2)  # type: ignore[attr-defined]
    return status if isinstance(status, int) else 0


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends what stands inside as Ctrl-C does: schedulers and `timeout` send it."""

    def stop(number: int, frame: object) -> None:
        # A second one must not disturb what the first one ends.
        signal.signal(number, signal.SIG_IGN)
        raise Interrupted("interrupted (SIGTERM)", number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_show_warning = warnings.showwarning


def _notice(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A notice of hasten's own is a sentence; other warnings are shown as ever."""
    if issubclass(category, Notice):
        _say(str(message), 0)
    else:
        _show_warning(message, category, filename, lineno, file, line)


def _say(sentence: str, status: int) -> int:
    print(f"hasten: {sentence}", file=sys.stderr)
    return status
