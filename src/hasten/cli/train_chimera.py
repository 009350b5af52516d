"""`hasten train chimera`: a light model that estimates the states which the target has not computed yet."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from hasten.cli import options
from hasten.cli.groups import grouped
from hasten.cli.train_data import Data
from hasten.cli.train_heads import Fitting, Output, Store

app = typer.Typer()


@dataclass(frozen=True)
class Estimating:
    """What is asked of Chimera: as a command's default, an option each."""

    heads: Annotated[int, typer.Option(help="Levels: how many tokens ahead.")] = 4
    width: Annotated[int, typer.Option(help="Channels of each token's share of a trigram.")] = 288
    ffn: Annotated[int, typer.Option(help="Channels of the layer's MLP.")] = 768
    words: Annotated[int, typer.Option(help="Tokens that heads may say, the most frequent ones; 0 for all.")] = 8192
    labels: Annotated[
        bool, typer.Option("--labels", help="Learn the tokens that were said, not the model's probabilities.")
    ] = False
    store: Store = "q8_0"


@app.command()
@grouped
def chimera(
    model: options.Model = "smollm2",
    output: Output = None,
    estimating: Estimating = Estimating(),
    fitting: Fitting = Fitting(),
    data: Data = Data(),
    backend: options.Backend = "auto",
    threads: options.Threads = 0,
) -> None:
    """Train Chimera's encoders and heads for a model, on what it says itself (2402.15758).

    Everything is kept: after Ctrl-C the same command goes on.
    """
    llm = options.Loading(backend=backend, threads=threads).load(model)

    from hasten.methods.heads.head import FINAL
    from hasten.train.heads.chimera import ChimeraRecipe

    # Refuses what cannot be before anything is made.
    recipe = ChimeraRecipe(parent=str(llm.folder), **asdict(estimating), **fitting.schedule)
    fitting.train(recipe, llm, "chimera", data, (FINAL,), output)
