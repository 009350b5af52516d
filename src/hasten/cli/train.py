"""`hasten train`: models and drafters, with progress, resume and a card."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import (
    options,
    train_chimera,
    train_diffusion,
    train_drafters,
    train_heads,
    train_learn2pd,
    train_lud,
    train_probes,
    train_skipdecode,
)
from hasten.cli.groups import grouped
from hasten.cli.training import Run
from hasten.errors import UserError
from hasten.files import write_text

app = typer.Typer(help="Train models (resumable, with a card).", invoke_without_command=True)
app.add_typer(train_diffusion.app)
app.add_typer(train_learn2pd.app)
app.add_typer(train_heads.app)
app.add_typer(train_chimera.app)
app.add_typer(train_probes.app)
app.add_typer(train_drafters.app)
app.add_typer(train_skipdecode.app)
app.add_typer(train_lud.app)


@app.callback()
def family(context: typer.Context) -> None:
    """Train models (resumable, with a card)."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        # By torchrun.
        from hasten.train.processes import joined

        context.with_resource(joined())


@app.command()
@grouped
def lm(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new model.")],
    hidden: Annotated[int, typer.Option(help="Width.")] = 256,
    layers: Annotated[int, typer.Option(help="Depth.")] = 5,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(help="Key/value heads.")] = 4,
    ffn: Annotated[int, typer.Option(help="Width of the MLP.")] = 640,
    vocabulary: Annotated[int, typer.Option(help="Tokens of a new tokenizer.")] = 2048,
    context: Annotated[int, typer.Option(help="Context length.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Training tokens, padding included.")] = 26_000_000,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per step; half in the opening.")] = 2048,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2.5e-3,
    opening: Annotated[float, typer.Option(help="Share of the run with short copying tasks only.")] = 0.07,
    curriculum: Annotated[float, typer.Option(help="Share of the run until tasks have full length.")] = 0.65,
    seed: Annotated[int, typer.Option(help="Of weights, tokenizer and data.")] = 0,
    precision: Annotated[str, typer.Option(help="bf16 (autocast) or fp32.")] = "bf16",
    tokenizer: Annotated[str | None, typer.Option(help="Take the tokenizer of this model (drafters must).")] = None,
    run: Run = Run(),
) -> None:
    """Pre-train a Llama-architecture language model on hasten's tasks and the standard library's prose.

    Ctrl-C saves a checkpoint; the same command continues from it, and only writes the card of a model that is there.
    """
    from hasten.train.card import write_card
    from hasten.train.lm import Pretraining

    recipe = Pretraining(
        hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, ffn=ffn, vocabulary=vocabulary, context=context,
        tokens=tokens, batch_tokens=batch_tokens, lr=lr, opening=opening, curriculum=curriculum, seed=seed,
        precision=precision, tokenizer_of=tokenizer,
    )  # fmt: skip
    run.train(recipe, output, write_card)


@app.command()
def scylla(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the drafters and of the report.")],
    model: options.Model = "tiny",
    tokens: Annotated[
        str, typer.Option(help="Training tokens of the drafters of the data axis.")
    ] = "250000,500000,1000000,2000000,4000000",
    layers: Annotated[str, typer.Option(help="Layers of the drafters of the capacity axis.")] = "1,2,3,4,6",
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,2,4,8,16",
    hidden: Annotated[int, typer.Option(help="Width of all drafters.")] = 96,
    length: Annotated[int, typer.Option(help="Draft length.")] = 4,
    per_task: Annotated[int, typer.Option(help="Held-out prompts of each task.")] = 10,
    max_tokens: Annotated[int, typer.Option(help="New tokens per prompt at most.")] = 64,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    backend: options.Backend = "auto",
    threads: options.Threads = 0,
    json: options.Json = False,
) -> None:
    """Train a family of drafters, and fit how tokens per step grow with training and size (Scylla, 2505.07858).

    The data axis has two layers, the capacity axis the middle number of training tokens. Drafters that are there
    already are not trained again; one that was interrupted is trained to its end.
    """
    axes = {name: _numbers(name, text) for name, text in (("tokens", tokens), ("layers", layers), ("batches", batches))}
    llm = options.Loading(dtype="float32", backend=backend, threads=threads).load(model)

    from rich.console import Console

    from hasten.bench import plots
    from hasten.bench.scylla import Family, render
    from hasten.bench.scylla import scylla as examine
    from hasten.bench.suite import load_suite
    from hasten.train.lm import Pretraining
    from hasten.train.trainer import train

    plots.require()

    def member(budget: int, depth: int) -> Path:
        folder = output / f"tokens-{budget}-layers-{depth}"
        recipe = Pretraining(
            hidden=hidden, layers=depth, heads=4, kv_heads=2, ffn=8 * hidden // 3, tokens=budget, seed=seed,
            tokenizer_of=str(llm.folder),
        )  # fmt: skip
        train(recipe, folder)
        return folder

    middle = axes["tokens"][len(axes["tokens"]) // 2]
    family = Family(
        [(budget, member(budget, 2)) for budget in axes["tokens"]],
        [(depth, member(middle, depth)) for depth in axes["layers"]],
    )
    prompts = [item.prompt for item in load_suite("tasks", per_task)]
    console = Console(stderr=True)
    with console.status("measuring") as status:
        document = examine(
            llm, family, prompts, length, axes["batches"], max_tokens, (lambda stage: None) if json else status.update
        )
    write_text(output / "laws.svg", plots.laws(document))
    card = output / "README.md"
    write_text(card, render(document, options.command_line()))
    if json:
        options.emit({"output": str(output), "card": str(card), **document})
    else:
        print(card.read_text())


def _numbers(name: str, text: str) -> list[int]:
    """Ascending positive numbers from a list with commas; four at least, since fewer say nothing about a law."""
    try:
        numbers = sorted({int(item) for item in text.split(",")})
    except ValueError:
        raise UserError(f"{name} must be whole numbers separated by commas, not {text!r}") from None
    if len(numbers) < 4 or numbers[0] < 1:
        raise UserError(f"{name} must be at least four different positive numbers, not {text!r}")
    return numbers
