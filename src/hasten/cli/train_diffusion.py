"""`hasten train mdm`, `nbdiff`, `tidar`, `fast-dllm-v2`: adaptation to masked and block diffusion."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import options

if TYPE_CHECKING:
    from hasten.train.diffusion.adapt import Adaptation

app = typer.Typer()

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the new model.")]
Parent = Annotated[str, typer.Option("--model", "-m", help="Adapt this one: a folder or a shipped model's name.")]
Tokens = Annotated[int, typer.Option(help="Training tokens, padding included.")]
BatchTokens = Annotated[int, typer.Option(help="Tokens per step.")]
Context = Annotated[int, typer.Option(help="Longest text in tokens.")]
Answers = Annotated[int, typer.Option(help="Longest answer in tokens; 0 for any.")]
Rate = Annotated[float, typer.Option(help="Peak learning rate.")]
Seed = Annotated[int, typer.Option(help="Of data and noise.")]
Precision = Annotated[str, typer.Option(help="bf16 or fp32, of the products.")]
Resume = Annotated[bool, typer.Option(help="Continue from a checkpoint in the output folder.")]
PerTask = Annotated[int, typer.Option(help="Held-out examples of each task for the card.")]
Block = Annotated[int, typer.Option(help="Positions per block.")]


@app.command()
def mdm(
    output: Output,
    model: Parent = "tiny",
    sequential: Annotated[float, typer.Option(help="Share of texts that are hidden block after block.")] = 0.8,
    tokens: Tokens = 6_000_000,
    batch_tokens: BatchTokens = 2048,
    context: Context = 512,
    answers: Answers = 128,
    lr: Rate = 2e-3,
    seed: Seed = 0,
    precision: Precision = "bf16",
    resume: Resume = True,
    per_task: PerTask = 50,
    threads: options.Threads = 0,
    json: options.Json = False,
) -> None:
    """Adapt a model to masked diffusion over a whole canvas (LLaDA, 2502.09992). Ctrl-C saves a checkpoint."""
    from hasten.train.diffusion.mdm import MaskedDiffusion

    recipe = MaskedDiffusion(
        parent=model, sequential=sequential, tokens=tokens, batch_tokens=batch_tokens, context=context, answers=answers,
        lr=lr, seed=seed, precision=precision,
    )  # fmt: skip
    _run(recipe, output, resume, per_task, threads, json)


@app.command()
def nbdiff(
    output: Output,
    model: Parent = "tiny",
    block: Block = 8,
    ramp: Annotated[float, typer.Option(help="Share of the run in which blocks grow from one token.")] = 0.2,
    retention: Annotated[float, typer.Option(help="Weight of the next-token loss.")] = 1.0,
    tokens: Tokens = 6_000_000,
    batch_tokens: BatchTokens = 2048,
    context: Context = 512,
    answers: Answers = 128,
    lr: Rate = 1e-3,
    seed: Seed = 0,
    precision: Precision = "bf16",
    resume: Resume = True,
    per_task: PerTask = 50,
    threads: options.Threads = 0,
    json: options.Json = False,
) -> None:
    """Adapt a model to block diffusion with a causal context (NBDiff, 2512.06776). Ctrl-C saves a checkpoint."""
    from hasten.train.diffusion.nbdiff import NextBlock

    recipe = NextBlock(
        parent=model, block=block, ramp=ramp, retention=retention, tokens=tokens, batch_tokens=batch_tokens,
        context=context, answers=answers, lr=lr, seed=seed, precision=precision,
    )  # fmt: skip
    _run(recipe, output, resume, per_task, threads, json)


@app.command()
def tidar(
    output: Output,
    model: Parent = "tiny",
    block: Block = 8,
    alpha: Annotated[float, typer.Option(help="Weight of the next-token loss.")] = 1.0,
    tokens: Tokens = 6_000_000,
    batch_tokens: BatchTokens = 2048,
    context: Context = 512,
    answers: Answers = 128,
    lr: Rate = 1e-3,
    seed: Seed = 0,
    precision: Precision = "bf16",
    resume: Resume = True,
    per_task: PerTask = 50,
    threads: options.Threads = 0,
    json: options.Json = False,
) -> None:
    """Adapt a model to drafting from masks and verifying itself (TiDAR, 2511.08923). Ctrl-C saves a checkpoint."""
    from hasten.train.diffusion.tidar import DraftAndVerify

    recipe = DraftAndVerify(
        parent=model, block=block, alpha=alpha, tokens=tokens, batch_tokens=batch_tokens, context=context,
        answers=answers, lr=lr, seed=seed, precision=precision,
    )  # fmt: skip
    _run(recipe, output, resume, per_task, threads, json)


@app.command("fast-dllm-v2")
def fast_dllm_v2(
    output: Output,
    model: Parent = "tiny",
    block: Block = 8,
    tokens: Tokens = 6_000_000,
    batch_tokens: BatchTokens = 2048,
    context: Context = 512,
    answers: Answers = 128,
    lr: Rate = 1e-3,
    seed: Seed = 0,
    precision: Precision = "bf16",
    resume: Resume = True,
    per_task: PerTask = 50,
    threads: options.Threads = 0,
    json: options.Json = False,
) -> None:
    """Adapt a model to block diffusion, blocks bidirectional (Fast-dLLM v2, 2509.26328). Ctrl-C saves a checkpoint."""
    from hasten.train.diffusion.fast_dllm_v2 import ComplementaryBlocks

    recipe = ComplementaryBlocks(
        parent=model, block=block, tokens=tokens, batch_tokens=batch_tokens, context=context, answers=answers, lr=lr,
        seed=seed, precision=precision,
    )  # fmt: skip
    _run(recipe, output, resume, per_task, threads, json)


def _run(recipe: Adaptation, output: Path, resume: bool, per_task: int, threads: int, json: bool) -> None:
    """Train, score, and say where the model is."""
    import torch

    from hasten.train.diffusion.card import write_card
    from hasten.train.trainer import train

    if threads > 0:
        torch.set_num_threads(threads)
    summary: dict[str, Any] = train(recipe, output, resume)
    command = shlex.join(["hasten", *sys.argv[1:]])
    with options.progress("scoring", 0, quiet=json) as advance:
        card = write_card(recipe, output, summary, command, per_task, advance)
    if json:
        options.emit({"output": str(output), "card": str(card), **summary})
    else:
        print(f"{output}: {summary['parameters']:,} parameters, loss {summary['loss']}; card: {card}")
