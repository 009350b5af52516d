"""The `hasten` program: its commands, and the one place where errors become a sentence and an exit status."""

from __future__ import annotations

import sys
from typing import Annotated

import click
import typer

from hasten import __version__
from hasten.cli import bench, doctor, generate, methods, race, train, verify
from hasten.errors import UserError

app = typer.Typer(
    name="hasten",
    help="The same tokens, sooner: decoding accelerators for Hugging Face checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(race.race)
app.command()(generate.generate)
app.command()(methods.methods)
app.command()(verify.verify)
app.command()(bench.bench)
app.command()(doctor.doctor)
app.add_typer(train.app, name="train")


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """The same tokens, sooner: decoding accelerators for Hugging Face checkpoints."""
    if show:
        typer.echo(f"hasten {__version__}")
        raise typer.Exit


def main() -> None:
    """Run; exit 0 if all went well, 2 on bad input (one sentence on stderr), 130 on Ctrl-C."""
    try:
        status = app(standalone_mode=False)
    except UserError as error:
        sys.exit(_say(str(error), 2))
    except (click.exceptions.NoArgsIsHelpError, click.exceptions.Exit) as leaving:
        if isinstance(leaving, click.exceptions.NoArgsIsHelpError):
            leaving.show()
        sys.exit(leaving.exit_code)
    except click.ClickException as error:
        sys.exit(_say(error.format_message(), 2))
    except (KeyboardInterrupt, click.Abort):
        sys.exit(_say("interrupted", 130))
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    sys.exit(status if isinstance(status, int) else 0)


def _say(sentence: str, status: int) -> int:
    print(f"hasten: {sentence}", file=sys.stderr)
    return status
