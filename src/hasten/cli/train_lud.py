"""`hasten train lud`: a model that says the rest of a lexical unit at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import options
from hasten.cli.groups import grouped
from hasten.cli.train_data import Talk
from hasten.cli.training import Run
from hasten.errors import UserError

app = typer.Typer()


@dataclass(frozen=True)
class Units:
    """What is learned, and for how long: as a command's default, an option each (`hasten.cli.groups`)."""

    placeholders: Annotated[int, typer.Option(help="Behind the text: how many tokens after the next one.")] = 3
    alpha: Annotated[float, typer.Option(help="Least probability of a unit's tokens, but for the first.")] = 0.9
    mix: Annotated[float, typer.Option(help="Weight of placeholders beside ordinary rows; 0: a control.")] = 1.0
    surplus: Annotated[float, typer.Option(help="Weight of placeholders beyond the end of a unit.")] = 0.1
    batch_tokens: Annotated[int, typer.Option(help="Tokens per step, without placeholders.")] = 2048
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-4
    seed: Annotated[int, typer.Option(help="Of the order.")] = 0
    precision: Annotated[str, typer.Option(help="bf16 or fp32, of the products.")] = "bf16"


@app.command()
@grouped
def lud(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new model.")],
    model: Annotated[str, typer.Option("--model", "-m", help="What it begins as: a folder or a name.")] = "tiny",
    units: Units = Units(),
    epochs: Annotated[float, typer.Option(help="Times that every dialogue is seen.")] = 3.0,
    talk: Talk = Talk(),
    run: Run = Run(),
) -> None:
    """Train a model for lexical unit decoding, on what it says itself (2405.15208).

    Everything is kept: after Ctrl-C the same command goes on.
    """
    if not 0 < epochs < inf:
        raise UserError(f"epochs must be positive and finite, not {epochs}")

    from hasten.train.lud.card import scored_models, write_card
    from hasten.train.lud.recipe import LexicalUnits
    from hasten.train.lud.units import FILE, read_confidences

    # Refuses what cannot be before anything is made.
    recipe = LexicalUnits(parent=model, tokens=1, **vars(units))
    llm = options.Loading(dtype="float32", threads=run.threads).load(model)
    budget = talk.clock(output)
    folder, dialogues = talk.write(llm, run.json, budget)
    with options.progress("marking", len(dialogues), quiet=run.json) as advance:
        read_confidences(llm, dialogues, folder / FILE, advance)
    rows = sum(len(dialogue.ids) for dialogue in dialogues)
    recipe = replace(recipe, data=str(folder), tokens=max(1, int(epochs * rows)))
    if budget is not None:
        recipe = budget.cut(recipe)
    decodings = sum(len(methods) for _, _, methods in scored_models(recipe, output))
    run.train(recipe, output, partial(write_card, recipe), decodings, {"dialogues": len(dialogues)})
