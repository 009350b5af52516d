"""`hasten doctor`: what this machine can do."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.cli import options, streams
from hasten.cli.groups import grouped
from hasten.cli.options import Loading
from hasten.errors import UserError
from hasten.files import write_text

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32", "weights": "dense"},
    "bfloat16": {"dtype": "bfloat16", "weights": "dense"},
    "int8": {"dtype": "bfloat16", "weights": "int8"},
    "int4": {"dtype": "bfloat16", "weights": "int4"},
}
"""How those are loaded that a picture compares."""


@grouped
def doctor(
    model: options.Model = "tiny",
    loading: Loading = Loading(),
    picture: Annotated[
        Path | None, typer.Option(help="Compare steps in all precisions, and draw them into this SVG file.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Compare predictions with those in float32 on these prompts: JSONL (key `prompt` or `turns`) or text, "
            "one per line (default: a few that ship, where weights are rounded or stored in few bits)."
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure read bandwidth, a step's cost against it, what further rows of a step cost, and what rounding costs."""
    from rich.console import Console

    from hasten.bench import plots
    from hasten.bench.doctor import doctor as examine

    if picture is not None:
        plots.check_target(picture)
    llm = loading.load(model)
    precisions = None
    if picture is not None:
        if llm.model.backend.name != "native":
            raise UserError("a picture compares precisions of the native backend, which cannot run this model here")
        precisions = {
            name: partial(replace(loading, device="cpu", backend="native", numerics="default", **precision).load, model)
            for name, precision in PRECISIONS.items()
        }
    invariant = None
    if llm.model.device.type == "cuda":
        invariant = partial(replace(loading, numerics="invariant").load, model)
    plain = replace(loading, dtype="float32", backend="torch", weights="dense", numerics="default")
    # A model that fills masked positions predicts what depends on how a canvas is filled.
    expanded = partial(plain.load, model) if llm.model.config.diffusion is None else None
    if prompts is not None and expanded is None:
        raise UserError("predictions of models that fill masked positions are not compared: leave --prompts out")
    console = Console(stderr=True)
    with console.status("starting") as status:
        document = examine(
            llm, precisions, invariant, expanded, prompts, status.update if not json else (lambda stage: None)
        )
    if picture is not None:
        write_text(picture, plots.step_costs(document))
    if json:
        options.emit(document)
    else:
        _print(document)
        if picture is not None:
            Console(highlight=False, markup=False).print(f"\ndrawn in {picture}")


def _print(document: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    plain = ("device", "processor", "threads", "torch", "backend", "kernels", "dtype", "model")
    for key in plain:
        if document[key] is not None:
            console.print(f"{key:>14}  {document[key]}")
    console.print(f"{'bandwidth':>14}  {document['bandwidth_gbs']:.1f} GB/s read")
    console.print(f"{'weights':>14}  {document['weight_bytes'] / 1e6:.1f} MB per step")
    console.print(
        f"{'step':>14}  {document['step_ms']:.3f} ms for one row; reading the weights from memory takes "
        f"{document['roofline_ms']:.3f} ms ({document['bandwidth_share']:.2f} of the bandwidth is used)"
    )
    console.print(f"{'a row more':>14}  {document['token_cost']:.2f} steps: what a drafted token must be accepted for")
    invariant = "yes" if document["row_invariant"] else "no (near-ties may fall differently in larger steps)"
    console.print(f"{'row-invariant':>14}  {invariant}")
    if "invariance_price" in document:
        price = document["invariance_price"]
        console.print(f"{'its price':>14}  {price:.2f} times the step: what --numerics invariant costs here")
    if document["divergence"] is not None:
        found = document["divergence"]
        console.print(
            f"{'rounding':>14}  KL {found['kl']:.5f} from float32, the same likeliest token in {found['top1']:.1%} of "
            f"{found['rows']:,} rows"
        )
    console.print(f"\n{'rows':>14}  cost of a step, relative to one row: v(n)")
    bar = "█" if streams.takes_all_characters() else "#"
    longest = max(document["verify_cost"].values())
    for count, cost in document["verify_cost"].items():
        console.print(f"{count:>14}  {bar * max(1, round(40 * cost / longest))} {cost:.2f}")
