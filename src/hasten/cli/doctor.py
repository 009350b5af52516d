"""`hasten doctor`: what this machine can do."""

from __future__ import annotations

from typing import Any

from hasten.cli import options


def doctor(
    model: options.Model = "tiny",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    backend: options.Backend = "auto",
    weights: options.Weights = "dense",
    threads: options.Threads = 0,
    json: options.Json = False,
) -> None:
    """Measure read bandwidth, the cost of a step against it, and what each further row of a step costs."""
    llm = options.load(model, dtype, device, threads, backend, weights)

    from rich.console import Console

    from hasten.bench.doctor import doctor as examine

    console = Console(stderr=True)
    with console.status("starting") as status:
        document = examine(llm, status.update if not json else (lambda stage: None))
    if json:
        options.emit(document)
    else:
        _print(document)


def _print(document: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    plain = ("device", "processor", "threads", "torch", "backend", "dtype", "model")
    for key in plain:
        console.print(f"{key:>14}  {document[key]}")
    console.print(f"{'bandwidth':>14}  {document['bandwidth_gbs']:.1f} GB/s read")
    console.print(f"{'weights':>14}  {document['weight_bytes'] / 1e6:.1f} MB per step")
    console.print(
        f"{'step':>14}  {document['step_ms']:.3f} ms for one row; reading the weights from memory takes "
        f"{document['roofline_ms']:.3f} ms"
    )
    invariant = "yes" if document["row_invariant"] else "no (near-ties may fall differently in larger steps)"
    console.print(f"{'row-invariant':>14}  {invariant}")
    console.print(f"\n{'rows':>14}  cost of a step, relative to one row: v(n)")
    longest = max(document["verify_cost"].values())
    for count, cost in document["verify_cost"].items():
        console.print(f"{count:>14}  {'█' * max(1, round(40 * cost / longest))} {cost:.2f}")
