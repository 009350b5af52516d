"""The `hasten` program: its commands, and the one place where errors become a sentence and an exit status."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, TextIO

import typer

from hasten import __version__
from hasten.cli import bench, doctor, generate, methods, race, sweep, train, tune, verify
from hasten.errors import Notice, UserError

# Typer brings its own copy of Click; its usage errors are known by what a public one inherits from.
ClickException = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="hasten",
    help="The same tokens, sooner: decoding accelerators for Hugging Face checkpoints.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(race.race)
app.command()(generate.generate)
app.command()(methods.methods)
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
    """Run; exit 0 if all went well, 2 on bad input (one sentence on stderr), 130 on Ctrl-C."""
    warnings.showwarning = _notice
    try:
        status = app(standalone_mode=False)
    except UserError as error:
        sys.exit(_say(str(error), 2))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_say("interrupted", 130))
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        if not isinstance(error, ClickException):
            raise
        sys.exit(_say(" ".join(error.format_message().split()), 2))  # type: ignore[attr-defined]
    sys.exit(status if isinstance(status, int) else 0)


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
