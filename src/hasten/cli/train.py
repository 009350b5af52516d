"""`hasten train`: models and drafters, with progress, resume and a card."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import options

app = typer.Typer(help="Train models (resumable, with a card).", invoke_without_command=True)


@app.callback()
def family(context: typer.Context) -> None:
    """Train models (resumable, with a card)."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
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
    resume: Annotated[bool, typer.Option(help="Continue from a checkpoint in the output folder.")] = True,
    per_task: Annotated[int, typer.Option(help="Held-out examples of each task for the card.")] = 50,
    threads: options.Threads = 0,
    json: options.Json = False,
) -> None:
    """Pre-train a Llama-architecture language model on hasten's tasks and the standard library's prose.

    Ctrl-C saves a checkpoint; the same command continues from it.
    """
    import torch

    from hasten.model.checkpoint import resolve
    from hasten.train.card import write_card
    from hasten.train.lm import TrainConfig, train

    if threads > 0:
        torch.set_num_threads(threads)
    config = TrainConfig(
        hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, ffn=ffn, vocabulary=vocabulary, context=context,
        tokens=tokens, batch_tokens=batch_tokens, lr=lr, opening=opening, curriculum=curriculum, seed=seed,
        precision=precision,
    )  # fmt: skip
    summary = train(config, output, resolve(tokenizer) if tokenizer is not None else None, resume)
    command = shlex.join(["hasten", *sys.argv[1:]])
    with options.progress("scoring", 0, quiet=json) as advance:
        card = write_card(output, summary, command, per_task, advance)
    if json:
        options.emit({"output": str(output), "card": str(card), **summary})
    else:
        print(f"{output}: {summary['parameters']:,} parameters, loss {summary['loss']}; card: {card}")
