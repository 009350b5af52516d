"""`hasten train ppd` and its like: what asks a frozen target for the tokens behind the next one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import options
from hasten.cli.groups import grouped
from hasten.cli.train_data import Talk
from hasten.cli.train_heads import BatchesPerStep, Output, SpecBench, batches_of_step, conclude, questions

if TYPE_CHECKING:
    from hasten.train.heads.inserted import InsertedRecipe

app = typer.Typer()

Ahead = Annotated[int, typer.Option("--prompts", help="How many tokens ahead are asked for, after the next one.")]
Rate = Annotated[float, typer.Option("--lr", help="Peak learning rate.")]


@dataclass(frozen=True)
class Asking:
    """A run: as a command's default, an option each (`hasten.cli.groups`)."""

    tokens: Annotated[int, typer.Option(help="Tokens of dialogues that are read.")] = 180_000
    batch_tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 512
    places: Annotated[int, typer.Option(help="Places of each dialogue where is asked, at most.")] = 32
    precision: Annotated[str, typer.Option(help="bf16 or fp32, of the target as it is read.")] = "bf16"
    seed: Annotated[int, typer.Option(help="Of the order, and of the places.")] = 0
    batches_per_step: BatchesPerStep = 0
    spec_bench: SpecBench = None
    resume: Annotated[bool, typer.Option(help="Continue from a checkpoint in the output folder.")] = True
    backend: options.Backend = "auto"
    threads: options.Threads = 0
    json: options.Json = False

    @property
    def settings(self) -> dict[str, Any]:
        """Of a recipe."""
        own = {name: getattr(self, name) for name in ("tokens", "batch_tokens", "places", "precision", "seed")}
        return own | {"batches_per_step": batches_of_step(self.batches_per_step)}

    def train(self, recipe: InsertedRecipe[Any], slug: str, model: str, output: Path | None, talk: Talk) -> None:
        """Make dialogues, train on them, write what came of it into the card, and say where it is.

        Args:
            recipe: has refused what cannot be; its target and its data are yet to come.
        """
        llm = options.Loading(backend=self.backend, threads=self.threads).load(model)

        from hasten.methods.heads.head import beside
        from hasten.train.trainer import train

        destination, asked = output or beside(llm.folder, slug), questions(self.spec_bench)
        budget = talk.clock(destination)
        folder, dialogues = talk.write(llm, self.json, budget)
        run = replace(recipe, parent=str(llm.folder), data=str(folder))
        if budget is not None:
            run = budget.cut(run)
        summary = train(run, destination, self.resume)
        conclude(destination, llm, slug, summary, len(dialogues), asked, self.json)


@app.command()
@grouped
def ppd(
    model: options.Model = "smollm2",
    output: Output = None,
    ahead: Ahead = 3,
    ensemble: Annotated[int, typer.Option(help="Vectors of each prompt token, whose answers are averaged.")] = 1,
    lr: Rate = 0.01,
    talk: Talk = Talk(),
    asking: Asking = Asking(),
) -> None:
    """Train PPD's prompt tokens for a model, on what it says itself (2405.18628).

    Everything is kept: after Ctrl-C the same command goes on.
    """
    from hasten.train.heads.ppd import PPDRecipe

    recipe = PPDRecipe(prompts=ahead, ensemble=ensemble, lr=lr, **asking.settings)
    asking.train(recipe, "ppd", model, output, talk)


@app.command()
@grouped
def hidden_transfer(
    model: options.Model = "smollm2",
    output: Output = None,
    ahead: Ahead = 3,
    share: Annotated[float, typer.Option(help="Of the model's layers, those below the maps.")] = 0.6,
    lr: Rate = 1e-3,
    talk: Talk = Talk(),
    asking: Asking = Asking(),
) -> None:
    """Train hidden transfer's maps for a model, on what it says itself (2404.12022).

    Everything is kept: after Ctrl-C the same command goes on.
    """
    from hasten.train.heads.hidden_transfer import TransferRecipe

    recipe = TransferRecipe(prompts=ahead, share=share, lr=lr, **asking.settings)
    asking.train(recipe, "hidden-transfer", model, output, talk)
