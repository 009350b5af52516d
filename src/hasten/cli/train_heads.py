"""`hasten train medusa` and its like: drafters that read the target's hidden states."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from hasten.cli import options
from hasten.cli.groups import grouped
from hasten.cli.train_data import Data
from hasten.cli.train_joint import Joint
from hasten.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hasten.bench.acceptance import Questions
    from hasten.llm import LLM
    from hasten.train.heads.recipe import HeadRecipe
    from hasten.train.heads.states import Tap

app = typer.Typer()
SomeRecipe = TypeVar("SomeRecipe", bound="HeadRecipe[Any]")

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder of the heads (default: beside the model, found there).")
]

BatchesPerStep = Annotated[
    int, typer.Option(help="Batches of a step, which processes share (`torchrun`); 0: one for each process.")
]
SpecBench = Annotated[
    Path | None,
    typer.Option(help="Spec-Bench's file: how its answers are drafted goes into the card. Never trained on."),
]
Store = Annotated[str, typer.Option(help="What matrices are stored as: bf16, q8_0 or q4_1.")]


def batches_of_step(asked: int) -> int:
    """As many as asked for; of 0 as many as there are processes."""
    from hasten.train import processes

    return asked or processes.count()


def questions(file: Path | None) -> Questions:
    """Those that a finished drafter is measured on; none where no file is named.

    Raises:
        UserError: it cannot be read, or is not Spec-Bench's.
    """
    from hasten.bench.acceptance import chosen

    return [] if file is None else chosen(file)


def measured(llm: LLM, method: str, asked: Questions, quiet: bool) -> dict[str, Any]:
    """For a card, `spec_bench`: how a drafter fares with each category of questions; empty where there are none."""
    from hasten.bench.acceptance import acceptance

    if not asked:
        return {}
    with options.progress("drafting", len(asked), quiet=quiet) as advance:
        return {"spec_bench": acceptance(llm, method, asked, advance)}


@dataclass(frozen=True)
class Speaking:
    """What is asked of heads that say a token each: as a command's default, an option each."""

    heads: Annotated[int, typer.Option(help="Heads: how many tokens ahead.")] = 4
    layers: Annotated[int, typer.Option(help="Residual blocks of each.")] = 1
    words: Annotated[int, typer.Option(help="Tokens that heads may say, the most frequent ones; 0 for all.")] = 8192
    shared_head: Annotated[
        bool, typer.Option("--shared-head/--private-heads", help="One output matrix for all heads, or one for each.")
    ] = True
    labels: Annotated[
        bool, typer.Option("--labels", help="Learn the tokens that were said, not the model's probabilities.")
    ] = False
    store: Store = "q8_0"


@dataclass(frozen=True)
class Fitting:
    """A head's run: as a command's default, an option each."""

    epochs: Annotated[float, typer.Option(help="Times that every dialogue is seen.")] = 2.0
    batch_tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 2048
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3
    seed: Annotated[int, typer.Option(help="Of the order.")] = 0
    batches_per_step: BatchesPerStep = 0
    spec_bench: SpecBench = None
    resume: Annotated[bool, typer.Option(help="Continue from a checkpoint in the output folder.")] = True
    json: options.Json = False

    def __post_init__(self) -> None:
        if not 0 < self.epochs < inf:
            raise UserError(f"epochs must be positive and finite, not {self.epochs}")

    @property
    def schedule(self) -> dict[str, Any]:
        """What a recipe takes of it; how many tokens it is follows from the data."""
        return {
            "tokens": 1, "batch_tokens": self.batch_tokens, "lr": self.lr, "seed": self.seed,
            "batches_per_step": batches_of_step(self.batches_per_step),
        }  # fmt: skip

    def train(
        self, recipe: HeadRecipe[Any], llm: LLM, slug: str, data: Data, taps: Sequence[Tap], output: Path | None
    ) -> None:
        """Make what is missing of the data, train on it, and say where the heads are.

        Args:
            recipe: without its data and tokens.
            slug: of the method, whose heads these are.
            output: their folder; None for that beside the model.
        """
        from hasten.methods.heads.head import beside

        destination, asked = output or beside(llm.folder, slug), questions(self.spec_bench)
        _, summary = self.run(recipe, llm, data, taps, destination)
        conclude(destination, llm, slug, summary, data.dialogues, asked, self.json)

    def run(
        self, recipe: SomeRecipe, llm: LLM, data: Data, taps: Sequence[Tap], destination: Path
    ) -> tuple[SomeRecipe, dict[str, Any]]:
        """Make what is missing of the data, and train on it.

        Args:
            recipe: without its data and tokens.

        Returns:
            The recipe with both, and the run's summary.
        """
        from hasten.train.trainer import train

        budget = data.clock(destination)
        folder, rows = data.make(llm, taps, recipe.states, self.json, budget)
        run = replace(recipe, tokens=max(1, int(self.epochs * rows)), data=str(folder))
        if budget is not None:
            run = budget.cut(run)
        return run, train(run, destination, self.resume)


def conclude(
    folder: Path,
    llm: LLM,
    slug: str,
    summary: Mapping[str, Any],
    dialogues: int,
    asked: Questions,
    json: bool,
) -> None:
    """Write what a run was into its card, and say where its heads are: the first of several processes does.

    Args:
        slug: of the method whose heads these are.
        asked: what they draft for, for the card.
    """
    from hasten.model.fingerprint import fingerprint
    from hasten.train import processes
    from hasten.train.heads.recipe import write_card

    if not processes.first():
        return
    command = options.command_line()
    # All that they draft: what pays on this machine is nothing to a card.
    drafted = measured(llm, f"{slug}:head=[{folder}],sized=false", asked, json)
    write_card(folder, fingerprint(llm.model), summary, dialogues, command, drafted)
    if json:
        options.emit({"output": str(folder), **summary, "dialogues": dialogues, "command": command, **drafted})
    else:
        print(f"{folder}: {summary['parameters']:,} parameters, loss {summary['loss']}")


@app.command()
@grouped
def medusa(
    model: options.Model = "smollm2",
    output: Output = None,
    speaking: Speaking = Speaking(),
    joint: Joint = Joint(),
    fitting: Fitting = Fitting(),
    data: Data = Data(),
    backend: options.Backend = "auto",
    threads: options.Threads = 0,
) -> None:
    """Train Medusa's heads for a model, on what it says itself (2401.10774); perhaps the model with them (Medusa-2).

    Everything is kept: after Ctrl-C the same command goes on.
    """
    llm = options.Loading(backend=backend, threads=threads).load(model)

    from hasten.methods.heads.head import FINAL, beside
    from hasten.train import processes
    from hasten.train.heads.medusa import MedusaRecipe

    # Refuses what cannot be before anything is made.
    settings = {"parent": str(llm.folder), **asdict(speaking), **fitting.schedule}
    if not joint.joint:
        fitting.train(MedusaRecipe(**settings), llm, "medusa", data, (FINAL,), output)
        return
    recipe, folder = joint.recipe(output, **settings)
    asked = questions(fitting.spec_bench)
    recipe, summary = fitting.run(recipe, llm, data, (FINAL,), folder)
    if not processes.first():
        return
    made = joint.conclude(llm, folder, recipe, summary, fitting.json)
    conclude(beside(folder, "medusa"), made, "medusa", summary, data.dialogues, asked, fitting.json)


@app.command()
@grouped
def hydra(
    model: options.Model = "smollm2",
    output: Output = None,
    prefix: Annotated[
        bool, typer.Option("--prefix", help="Hydra++: heads read what a layer of their own makes of all states.")
    ] = False,
    speaking: Speaking = Speaking(store="q4_1"),
    fitting: Fitting = Fitting(epochs=1.0),
    data: Data = Data(),
    backend: options.Backend = "auto",
    threads: options.Threads = 0,
) -> None:
    """Train Hydra's heads for a model, on what it says itself (2402.05109).

    Everything is kept: after Ctrl-C the same command goes on.
    """
    llm = options.Loading(backend=backend, threads=threads).load(model)

    from hasten.methods.heads.head import FINAL
    from hasten.train.heads.hydra import HydraRecipe

    # Refuses what cannot be before anything is made.
    recipe = HydraRecipe(parent=str(llm.folder), prefix=prefix, **asdict(speaking), **fitting.schedule)
    fitting.train(recipe, llm, "hydra", data, (FINAL,), output)


@app.command()
@grouped
def eagle(
    model: options.Model = "smollm2",
    output: Output = None,
    version: Annotated[int, typer.Option(help="1: makes the next hidden state. 3: says the next words.")] = 3,
    steps: Annotated[int, typer.Option(help="Version 3: how far it drafts on its own outputs in training.")] = 3,
    words: Annotated[int, typer.Option(help="Tokens that it may say, the most frequent ones; 0 for all.")] = 8192,
    own_head: Annotated[
        bool, typer.Option("--own-head/--target-head", help="Version 3: train a head, or take the target's.")
    ] = True,
    precision: Annotated[str, typer.Option(help="Of products: bf16 or fp32.")] = "bf16",
    store: Store = "q8_0",
    fitting: Fitting = Fitting(epochs=1.0),
    data: Data = Data(),
    backend: options.Backend = "auto",
    threads: options.Threads = 0,
) -> None:
    """Train a head of EAGLE-1 and -2, or of EAGLE-3, for a model, on what it says itself (2401.15077, 2503.01840).

    Everything is kept: after Ctrl-C the same command goes on.
    """
    llm = options.Loading(backend=backend, threads=threads).load(model)

    from hasten.train.heads.eagle import Eagle1Recipe, Eagle3Recipe, EagleRecipe

    # Refuses what cannot be before anything is made.
    given = {"parent": str(llm.folder), "words": words, "precision": precision, "store": store, **fitting.schedule}
    if version not in (1, 3):
        raise UserError(f"version must be 1 or 3, not {version}")
    recipe: EagleRecipe = (
        Eagle1Recipe(**given) if version == 1 else Eagle3Recipe(steps=steps, own_head=own_head, **given)
    )
    fitting.train(recipe, llm, "eagle", data, recipe.taps(len(llm.model.layers)), output)
