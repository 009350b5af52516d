"""`hasten train align` and `s2d`: small models that draft, distilled from what a target says itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import options
from hasten.cli.groups import grouped
from hasten.cli.train_data import Data
from hasten.cli.train_heads import BatchesPerStep, SpecBench, batches_of_step, measured, questions
from hasten.documents import dumps
from hasten.errors import UserError
from hasten.files import write_text

if TYPE_CHECKING:
    from hasten.llm import LLM
    from hasten.train.drafters.align import AlignRecipe

app = typer.Typer()

Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder (default: beside the model, found there).")]
StreamCount = Annotated[int, typer.Option("--streams", help="Rows behind each token that guess further ones.")]
LossName = Annotated[str, typer.Option("--loss", help="ce, kl, tvd, tvd++, tvd++sampled or tvd++uniform.")]
CARD = "card.json"


@dataclass(frozen=True)
class Shape:
    """A drafter's: as a command's default, an option each (`hasten.cli.groups`)."""

    base: Annotated[str | None, typer.Option(help="A Llama to begin with, instead of a new one of the shape below.")]
    hidden: Annotated[int, typer.Option(help="Width.")]
    layers: Annotated[int, typer.Option(help="Depth.")]
    heads: Annotated[int, typer.Option(help="Query heads.")]
    kv_heads: Annotated[int, typer.Option(help="Key/value heads.")]
    ffn: Annotated[int, typer.Option(help="Width of the MLP.")]

    @property
    def settings(self) -> dict[str, Any]:
        """What every recipe is told of it."""
        return {
            "base": self.base or "", "hidden": self.hidden, "layers": self.layers, "attention_heads": self.heads,
            "kv_heads": self.kv_heads, "ffn": self.ffn,
        }  # fmt: skip


@dataclass(frozen=True)
class Distilling:
    """How a drafter is distilled: as a command's default, an option each (`hasten.cli.groups`)."""

    words: Annotated[int, typer.Option(help="Tokens that it knows, the most frequent of answers; 0 for all.")] = 8192
    opening: Annotated[
        float | None, typer.Option(help="Share of the run with kl, before (default: 0.5, with a base 0).")
    ] = None
    epochs: Annotated[float, typer.Option(help="Times that every dialogue is seen.")] = 2.0
    batch_tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 2048
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3
    seed: Annotated[int, typer.Option(help="Of weights and order.")] = 0
    batches_per_step: BatchesPerStep = 0
    spec_bench: SpecBench = None
    precision: Annotated[str, typer.Option(help="bf16 (products and activations) or fp32.")] = "bf16"
    resume: Annotated[bool, typer.Option(help="Continue from a checkpoint in the output folder.")] = True
    backend: options.Backend = "auto"
    threads: options.Threads = 0
    json: options.Json = False

    def load(self, model: str) -> LLM:
        """The target."""
        return options.Loading(backend=self.backend, threads=self.threads).load(model)

    def settings(self, llm: LLM, shape: Shape) -> dict[str, Any]:
        """What every recipe is told, but for the data.

        Raises:
            UserError: no number of epochs.
        """
        if not 0 < self.epochs < inf:
            raise UserError(f"epochs must be positive and finite, not {self.epochs}")
        opening = self.opening if self.opening is not None else 0.0 if shape.base else 0.5
        return {
            "tokens": 1, "batch_tokens": self.batch_tokens, "lr": self.lr, "seed": self.seed,
            "parent": str(llm.folder), "words": self.words, "opening": opening, "precision": self.precision,
            "batches_per_step": batches_of_step(self.batches_per_step), **shape.settings,
        }  # fmt: skip

    def train(self, llm: LLM, settings: AlignRecipe, data: Data, output: Path | None, suffix: str, method: str) -> None:
        """Make the data, train, write the card, and say where the drafter is.

        Args:
            suffix: of the folder beside the model, unless there is an output.
            method: that drafts with it, for the card.
        """
        from hasten.methods.drafters.small_model import own_name
        from hasten.methods.heads.head import FINAL
        from hasten.model.checkpoint import read_json
        from hasten.train import processes
        from hasten.train.trainer import train

        destination, asked = output or Path(own_name(llm.folder, suffix)), questions(self.spec_bench)
        budget = data.clock(destination)
        folder, rows = data.make(llm, (FINAL,), settings.states, self.json, budget)
        recipe = replace(settings, tokens=max(1, int(self.epochs * rows)), data=str(folder))
        if budget is not None:
            recipe = budget.cut(recipe)
        summary = train(recipe, destination, self.resume)
        if not processes.first():
            return
        told = read_json(destination / "config.json")["alignment"]
        drafted = measured(llm, f"{method}:model=[{destination}]", asked, self.json)
        document = {"command": options.command_line(), **summary, **told, **drafted}
        write_text(destination / CARD, dumps(document, indent=2) + "\n")
        self._report(destination, document)

    def _report(self, folder: Path, document: Mapping[str, Any]) -> None:
        if self.json:
            options.emit({"output": str(folder), **document})
        else:
            accepted = ", ".join(f"{100 * share:.1f} %" for share in document["acceptance"])
            print(f"{folder}: {document['parameters']:,} parameters, loss {document['loss']}; accepted {accepted}")


@app.command()
@grouped
def align(
    model: options.Model = "smollm2",
    output: Output = None,
    loss: LossName = "tvd++",
    shape: Shape = Shape(None, hidden=288, layers=3, heads=6, kv_heads=3, ffn=768),
    streams: StreamCount = 0,
    distilling: Distilling = Distilling(),
    data: Data = Data(),
) -> None:
    """Train a small model that drafts for a model, on what it says and how likely it finds all words (2403.00858).

    `draft-model` and its like find it by themselves. With streams, `mirror-sd` needs fewer of its passes (2510.13161).
    Everything is kept: after Ctrl-C the same command goes on.
    """
    llm = distilling.load(model)

    from hasten.train.drafters.align import AlignRecipe
    from hasten.train.drafters.streams import StreamedRecipe

    told = {**distilling.settings(llm, shape), "distance": loss}
    # Refuses what cannot be before anything is made.
    recipe = StreamedRecipe(**told, streams=streams) if streams else AlignRecipe(**told)
    distilling.train(llm, recipe, data, output, "draft", "draft-model")


@app.command()
@grouped
def s2d(
    model: options.Model = "smollm2",
    output: Output = None,
    exits: Annotated[str, typer.Option(help="Layers behind which it drafts; the last has all of them.")] = "2/4/6",
    loss: LossName = "kl",
    shape: Shape = Shape(None, hidden=256, layers=6, heads=4, kv_heads=2, ffn=576),
    distilling: Distilling = Distilling(),
    data: Data = Data(),
) -> None:
    """Train a drafter whose first layers are drafters, too, for the method `s2d` (2407.01955).

    It serves every model of the same tokenizer. Everything is kept: after Ctrl-C the same command goes on.
    """
    llm = distilling.load(model)

    from hasten.train.drafters.sorted import SortedRecipe

    recipe = SortedRecipe(**distilling.settings(llm, shape), distance=loss, leaves=exits)
    distilling.train(llm, recipe, data, output, "s2d", "s2d")
