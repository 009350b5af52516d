"""`hasten train learn2pd`: the filter that says which predictions are final."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import options
from hasten.files import write_text

app = typer.Typer()


@app.command()
def learn2pd(
    model: Annotated[str, typer.Option("--model", "-m", help="A diffusion model: a folder or a shipped one's name.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The filter's file (default: in the model's folder).")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Training prompts, each decoded twice.")] = 300,
    block: Annotated[int, typer.Option(help="Positions per block, for models without a block of their own.")] = 32,
    canvas: Annotated[int, typer.Option(help="New positions per prompt.")] = 96,
    epochs: Annotated[int, typer.Option(help="Of full-batch training.")] = 2000,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of prompts and weights.")] = 0,
    backend: options.Backend = "auto",
    threads: options.Threads = 0,
    json: options.Json = False,
) -> None:
    """Train Learn2PD's filter of confidences for a diffusion model (2509.25188); a card stands beside it.

    It takes minutes, and begins anew if it is interrupted; a filter that is there stays until the new one is whole.
    """
    llm = options.Loading(backend=backend, threads=threads).load(model)

    from hasten.train.learn2pd import FilterConfig, train_filter

    config = FilterConfig(prompts=prompts, block=block, canvas=canvas, epochs=epochs, lr=lr, seed=seed)
    with options.progress("replaying", prompts, quiet=json) as advance:
        summary = train_filter(llm, config, output, advance)
    card = Path(summary["output"]).with_suffix(".md")
    write_text(
        card,
        f"# Learn2PD's filter for {llm.folder.name}\n\n    {options.command_line()}\n\n"
        f"Blocks of {summary['block']}; {summary['records']:,} steps of {prompts} prompts, none behind the end of the "
        f"text; loss {summary['loss']}. On a tenth of the prompts that was held out, at masked positions and the "
        f"method's own threshold, {summary['precision']:.1%} of what is accepted is right, and {summary['recall']:.1%} "
        f"of what is right is accepted; of predictions that the text ends, {summary['end_precision']:.1%} and "
        f"{summary['end_recall']:.1%}.\n",
    )
    if json:
        options.emit({"card": str(card), **summary})
    else:
        print(f"{summary['output']}: precision {summary['precision']}, recall {summary['recall']}; card: {card}")
