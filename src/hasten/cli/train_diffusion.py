"""`hasten train mdm`, `nbdiff`, `tidar`, `fast-dllm-v2`, `dparallel`: adaptation to masked and block diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

import typer

from hasten.cli import options, training
from hasten.errors import UserError

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


@app.command()
def dparallel(
    output: Output,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Teacher: a model that fills masked positions.")
    ] = "tiny-block",
    prompts: Annotated[
        int, typer.Option(help="Questions that the teacher answers; the right answers are kept.")
    ] = 3_000,
    block: Annotated[int, typer.Option(help="Positions per block, for teachers without a block of their own.")] = 32,
    beta: Annotated[float, typer.Option(help="Weight of the entropy.")] = 2.0,
    temperature: Annotated[float, typer.Option(help="Of the distribution whose entropy is lowered.")] = 0.5,
    tokens: Tokens = 1_000_000,
    batch_tokens: BatchTokens = 2048,
    context: Context = 512,
    answers: Answers = 128,
    lr: Rate = 5e-5,
    seed: Seed = 0,
    precision: Precision = "bf16",
    resume: Resume = True,
    per_task: PerTask = 50,
    threads: options.Threads = 0,
    json: options.Json = False,
) -> None:
    """Distil a model to be sure of many tokens at once, on its own right answers (dParallel, 2509.26488).

    The answers are kept in the output folder. Ctrl-C keeps what is answered, or saves a checkpoint; the same command
    continues.
    """
    from hasten.train.answers import FILE
    from hasten.train.diffusion.dparallel import Distillation

    recipe = Distillation(
        parent=model, prompts=prompts, block=block, beta=beta, temperature=temperature, tokens=tokens,
        batch_tokens=batch_tokens, context=context, answers=answers, lr=lr, seed=seed, precision=precision,
    )  # fmt: skip
    if (output / FILE).exists() and not resume:
        raise UserError(f"{output / FILE} exists: resume it, or remove it to start again")
    with options.progress("answering", prompts, quiet=json) as advance:
        answered = recipe.ask(options.load(model, "float32", "auto", threads), output, advance)
    _run(recipe, output, resume, per_task, threads, json, answered)


def _run(
    recipe: Adaptation,
    output: Path,
    resume: bool,
    per_task: int,
    threads: int,
    json: bool,
    data: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Train, and write the card of an adapted model. `data` is what the summary says of the data."""
    from hasten.train.diffusion.card import scored_models, write_card

    decodings = sum(len(decoders) for _, _, decoders in scored_models(recipe, output))
    training.run(recipe, output, partial(write_card, recipe), decodings, resume, per_task, threads, json, data)
