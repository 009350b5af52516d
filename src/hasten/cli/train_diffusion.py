"""`hasten train mdm`, `nbdiff`, `tidar`, `fast-dllm-v2`, `dparallel`: adaptation to masked and block diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

import typer

from hasten.cli import options
from hasten.cli.groups import grouped
from hasten.cli.options import Loading
from hasten.cli.training import Run
from hasten.errors import UserError

if TYPE_CHECKING:
    from hasten.train.diffusion.adapt import Adaptation

app = typer.Typer()

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the new model.")]
Parent = Annotated[str, typer.Option("--model", "-m", help="Adapt this one: a folder or a shipped model's name.")]
Block = Annotated[int, typer.Option(help="Positions per block.")]


@dataclass(frozen=True)
class Schedule:
    """What all recipes of adaptation know, under their names: as a command's default, an option each."""

    tokens: Annotated[int, typer.Option(help="Training tokens, padding included.")] = 6_000_000
    batch_tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 2048
    context: Annotated[int, typer.Option(help="Longest text in tokens.")] = 512
    answers: Annotated[int, typer.Option(help="Longest answer in tokens; 0 for any.")] = 128
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3
    seed: Annotated[int, typer.Option(help="Of data and noise.")] = 0
    precision: Annotated[str, typer.Option(help="bf16 or fp32, of the products.")] = "bf16"


@app.command()
@grouped
def mdm(
    output: Output,
    model: Parent = "tiny",
    sequential: Annotated[float, typer.Option(help="Share of texts that are hidden block after block.")] = 0.8,
    schedule: Schedule = Schedule(lr=2e-3),
    run: Run = Run(),
) -> None:
    """Adapt a model to masked diffusion over a whole canvas (LLaDA, 2502.09992). Ctrl-C saves a checkpoint."""
    from hasten.train.diffusion.mdm import MaskedDiffusion

    recipe = MaskedDiffusion(parent=model, sequential=sequential, **vars(schedule))
    _train(recipe, output, run)


@app.command()
@grouped
def nbdiff(
    output: Output,
    model: Parent = "tiny",
    block: Block = 8,
    ramp: Annotated[float, typer.Option(help="Share of the run in which blocks grow from one token.")] = 0.2,
    retention: Annotated[float, typer.Option(help="Weight of the next-token loss.")] = 1.0,
    schedule: Schedule = Schedule(),
    run: Run = Run(),
) -> None:
    """Adapt a model to block diffusion with a causal context (NBDiff, 2512.06776). Ctrl-C saves a checkpoint."""
    from hasten.train.diffusion.nbdiff import NextBlock

    recipe = NextBlock(parent=model, block=block, ramp=ramp, retention=retention, **vars(schedule))
    _train(recipe, output, run)


@app.command()
@grouped
def tidar(
    output: Output,
    model: Parent = "tiny",
    block: Block = 8,
    alpha: Annotated[float, typer.Option(help="Weight of the next-token loss.")] = 1.0,
    schedule: Schedule = Schedule(),
    run: Run = Run(),
) -> None:
    """Adapt a model to drafting from masks and verifying itself (TiDAR, 2511.08923). Ctrl-C saves a checkpoint."""
    from hasten.train.diffusion.tidar import DraftAndVerify

    recipe = DraftAndVerify(parent=model, block=block, alpha=alpha, **vars(schedule))
    _train(recipe, output, run)


@app.command("fast-dllm-v2")
@grouped
def fast_dllm_v2(
    output: Output,
    model: Parent = "tiny",
    block: Block = 8,
    schedule: Schedule = Schedule(),
    run: Run = Run(),
) -> None:
    """Adapt a model to block diffusion, blocks bidirectional (Fast-dLLM v2, 2509.26328). Ctrl-C saves a checkpoint."""
    from hasten.train.diffusion.fast_dllm_v2 import ComplementaryBlocks

    recipe = ComplementaryBlocks(parent=model, block=block, **vars(schedule))
    _train(recipe, output, run)


@app.command()
@grouped
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
    schedule: Schedule = Schedule(tokens=1_000_000, lr=5e-5),
    run: Run = Run(),
) -> None:
    """Distil a model to be sure of many tokens at once, on its own right answers (dParallel, 2509.26488).

    The answers are kept in the output folder. Ctrl-C keeps what is answered, or saves a checkpoint; the same command
    continues.
    """
    from hasten.train.answers import FILE
    from hasten.train.diffusion.dparallel import Distillation

    recipe = Distillation(
        parent=model, prompts=prompts, block=block, beta=beta, temperature=temperature, **vars(schedule)
    )
    if (output / FILE).exists() and not run.resume:
        raise UserError(f"{output / FILE} exists: resume it, or remove it to start again")
    with options.progress("answering", prompts, quiet=run.json) as advance:
        answered = recipe.ask(Loading(dtype="float32", threads=run.threads).load(model), output, advance)
    _train(recipe, output, run, answered)


def _train(recipe: Adaptation, output: Path, run: Run, data: Mapping[str, int] = MappingProxyType({})) -> None:
    """Train, and write the card of an adapted model. `data` is what the summary says of the data."""
    from hasten.train.diffusion.card import scored_models, write_card

    decodings = sum(len(decoders) for _, _, decoders in scored_models(recipe, output))
    run.train(recipe, output, partial(write_card, recipe), decodings, data)
