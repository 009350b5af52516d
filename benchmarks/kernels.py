"""The native step's matrix products by rows, out of cache: what further rows cost in each precision.

python benchmarks/kernels.py [--shapes 2816x1024,4096x4096] [--formats float32,bfloat16,Q8_0,Q4_1] [--megabytes 256]

Copies of the matrix are used in turns, so that weights come from memory. Rows take turns, too; medians. `GB/s` is the
rate at which one row reads the weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import get_args

import torch

from hasten.bench.doctor import read_bandwidth
from hasten.model.native import Rounded, kernels
from hasten.model.native.blocks import BlockLinear
from hasten.model.native.linear import FORMATS, PanelLinear, Panels

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 64)
ROUNDED: tuple[Rounded, ...] = get_args(Rounded)


def linear(weight: torch.Tensor, format: str) -> Panels:
    """Panels of a weight in one of `FORMATS` or `ROUNDED`."""
    for plain in FORMATS:
        if plain == format:
            return PanelLinear(weight, None, plain)
    return next(BlockLinear.rounded(each, weight, None, weight.dtype) for each in ROUNDED if each == format)


def seconds(outputs: int, inputs: int, format: str, megabytes: int, rounds: int) -> tuple[dict[int, float], int]:
    """Of one product by rows, and the bytes of its weights."""
    weight = torch.randn(outputs, inputs)
    first = linear(weight, format)
    copies = [first, *(linear(weight, format) for _ in range(megabytes * 2**20 // first.nbytes()))]
    inputs_by_rows = {rows: torch.randn(rows, inputs) for rows in ROWS}
    times: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(rounds):
        for rows, x in inputs_by_rows.items():
            started = time.perf_counter()
            for copy in copies:
                copy.forward(x)
            times[rows].append((time.perf_counter() - started) / len(copies))
    return {rows: statistics.median(found) for rows, found in times.items()}, first.nbytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="2816x1024,4096x4096", help="outputs x inputs")
    parser.add_argument("--formats", default=",".join((*FORMATS, *ROUNDED)))
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if kernels() is None:
        parser.error("the native step was not built: no C++ compiler when hasten was installed")
    formats = [format for format in (*FORMATS, *ROUNDED) if format in options.formats.split(",")]
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"{kernels()}, {torch.get_num_threads()} threads, {read_bandwidth(torch.device('cpu')):.0f} GB/s read")
    print(f"{'shape':>10}{'weights':>10}{'us':>8}{'GB/s':>7}" + "".join(f"{f'v({rows})':>7}" for rows in ROWS[1:]))
    for shape in options.shapes.split(","):
        outputs, inputs = (int(size) for size in shape.split("x"))
        for format in formats:
            found, size = seconds(outputs, inputs, format, options.megabytes, options.rounds)
            costs = "".join(f"{found[rows] / found[1]:>7.2f}" for rows in ROWS[1:])
            print(f"{shape:>10}{format:>10}{1e6 * found[1]:>8.0f}{size / found[1] / 1e9:>7.1f}{costs}", flush=True)


if __name__ == "__main__":
    main()
