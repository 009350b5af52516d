"""`hasten train skipdecode`: a model that does without layers as its answer goes on."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from hasten.cli.groups import grouped
from hasten.cli.train_diffusion import Output, Schedule
from hasten.cli.training import Run
from hasten.errors import UserError

app = typer.Typer()


@app.command()
@grouped
def skipdecode(
    output: Output,
    model: Annotated[str, typer.Option("--model", "-m", help="Fine-tune this Llama: a folder or a name.")] = "tiny",
    shares: Annotated[str, typer.Option(help="Of layers, trained together; the first is the model's own.")] = "0.8",
    warm: Annotated[int, typer.Option(help="Lowest layers, which are always run.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of an answer at which the schedule ends.")] = 64,
    ramp: Annotated[float, typer.Option(help="Share of the run in which layers fall away.")] = 0.33,
    schedule: Schedule = Schedule(tokens=2_000_000, answers=0),
    run: Run = Run(),
) -> None:
    """Fine-tune a model under SkipDecode's schedules (2307.02628). Ctrl-C saves a checkpoint.

    The card has right answers before and after, by all shares and with all layers.
    """
    from hasten.train.skipdecode import ScheduledTuning, write_card

    try:
        trained = [float(share) for share in shares.split(",")]
    except ValueError as error:
        raise UserError(f"shares must be numbers with commas between, not {shares!r}") from error
    recipe = ScheduledTuning(parent=model, shares=trained, warm=warm, length=length, ramp=ramp, **vars(schedule))
    run.train(recipe, output, partial(write_card, recipe), 2 * (1 + len(trained)))
