"""`hasten doctor`: what this machine can do."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.cli import options
from hasten.errors import UserError

PRECISIONS = {
    "float32": ("float32", "dense"),
    "bfloat16": ("bfloat16", "dense"),
    "int8": ("bfloat16", "int8"),
    "int4": ("bfloat16", "int4"),
}
"""dtype and weights of those that a picture compares."""


def doctor(
    model: options.Model = "tiny",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    backend: options.Backend = "auto",
    weights: options.Weights = "dense",
    numerics: options.Numerics = "default",
    threads: options.Threads = 0,
    picture: Annotated[
        Path | None, typer.Option(help="Compare steps in all precisions, and draw them into this SVG file.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure read bandwidth, the cost of a step against it, and what each further row of a step costs."""
    from rich.console import Console

    from hasten.bench import plots
    from hasten.bench.doctor import doctor as examine

    if picture is not None:
        plots.check_target(picture)
    llm = options.load(model, dtype, device, threads, backend, weights, numerics)
    precisions = None
    if picture is not None:
        if llm.model.backend.name != "native":
            raise UserError("a picture compares precisions of the native backend, which cannot run this model here")
        precisions = {
            name: partial(options.load, model, kind, "cpu", threads, "native", rounded)
            for name, (kind, rounded) in PRECISIONS.items()
        }
    invariant = None
    if llm.model.device.type == "cuda":
        invariant = partial(options.load, model, dtype, device, threads, backend, weights, "invariant")
    console = Console(stderr=True)
    with console.status("starting") as status:
        document = examine(llm, precisions, invariant, status.update if not json else (lambda stage: None))
    if picture is not None:
        picture.write_text(plots.step_costs(document), encoding="utf-8")
    if json:
        options.emit(document)
    else:
        _print(document)
        if picture is not None:
            Console(highlight=False).print(f"\ndrawn in {picture}")


def _print(document: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
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
    console.print(f"\n{'rows':>14}  cost of a step, relative to one row: v(n)")
    longest = max(document["verify_cost"].values())
    for count, cost in document["verify_cost"].items():
        console.print(f"{count:>14}  {'█' * max(1, round(40 * cost / longest))} {cost:.2f}")
