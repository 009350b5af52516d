"""Which kernel multiplies how many rows by a weight: measured once per shape and GPU, and kept.

Decoding's products are flat: few rows, a whole weight. What is fastest for them differs by rows and shape, so no kernel
is chosen for good (the heuristic dataflow of FlashDecoding++, arXiv 2311.01282): sums without matrix units, a flat
product whose rows are not padded to a large tile, and the library's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from hasten.documents import dumps
from hasten.errors import UserError
from hasten.files import cache_folder, write_text
from hasten.model.cuda.flat import FLAT_ROWS, VECTOR_ROWS, flat, vector
from hasten.model.cuda.softmax import TL_DTYPES
from hasten.model.linear import DenseLinear

ROWS = (1, 2, 4, 8, 16, 32, 64)
"""What is measured; up to the next of these, its kernel serves. The library has all that is larger."""
GAIN = 0.97
"""Share of the library's time that another kernel must stay below: less is noise."""

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
PRODUCTS: dict[str, tuple[int, Product]] = {
    "library": (ROWS[-1], F.linear),
    "vector": (VECTOR_ROWS, vector),
    "flat": (FLAT_ROWS, flat),
}
"""By name: the most rows it is measured for, and what computes rows [rows, in], weight [out, in] and bias [out]."""


class MeasuredLinear(DenseLinear):
    """A plain weight whose product is computed by the kernel that `kernels`, by rows of `ROWS`, names."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: Mapping[int, str]) -> None:
        super().__init__(weight, bias)
        self.kernels = kernels

    def forward(self, rows: Tensor) -> Tensor:
        count = rows.shape[0]
        name = next((self.kernels[size] for size in ROWS if size >= count), "library") if count else "library"
        return PRODUCTS[name][1](rows, self.weight, self.bias)


def serves(weight: Tensor) -> bool:
    """Whether there is anything to choose: on a GPU, where the kernels know the weight's dtype."""
    return weight.device.type == "cuda" and weight.dtype in TL_DTYPES and weight.is_contiguous()


def measured(weight: Tensor, bias: Tensor | None = None) -> MeasuredLinear:
    """A weight with the kernels for its shape: from disk if they were measured here before, else measured now."""
    on_gpu = weight.device.type == "cuda"
    subject = {
        "device": torch.cuda.get_device_name(weight.device) if on_gpu else "interpreter",
        "dtype": str(weight.dtype),
        "shape": list(weight.shape),
        "bias": bias is not None,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    name = hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()[:24]
    file = cache_folder("gpu-products") / f"{name}.json"
    kernels = _read(file)
    if kernels is None:
        with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
            times = measure(weight, bias)
        kernels = {rows: choose(found) for rows, found in times.items()}
        record = {"subject": subject, "kernels": kernels, "milliseconds": times}
        # What cannot be written costs a measurement next time, no more.
        with suppress(OSError, UserError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, dumps(record, indent=1))
    return MeasuredLinear(weight, bias, kernels)


def measure(weight: Tensor, bias: Tensor | None) -> dict[int, dict[str, float]]:
    """Milliseconds of each kernel that serves so many rows, by rows."""
    times: dict[int, dict[str, float]] = {}
    for count in ROWS:
        rows = torch.ones(count, weight.shape[1], dtype=weight.dtype, device=weight.device)
        times[count] = {
            name: milliseconds(product, rows, weight, bias)
            for name, (most, product) in PRODUCTS.items()
            if count <= most
        }
    return times


def milliseconds(product: Product, rows: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """The median of some runs that find nothing in the GPU's cache, as in a step, where all weights take turns."""
    return float(triton.testing.do_bench(lambda: product(rows, weight, bias), 5, 20, return_mode="median"))


def choose(times: Mapping[str, float]) -> str:
    """The fastest kernel by its time; the library where none is clearly faster."""
    best = min(times, key=times.__getitem__)
    return best if times[best] < GAIN * times["library"] else "library"


def _read(file: Path) -> dict[int, str] | None:
    """Recorded kernels; None where there are none, or none that can be read."""
    try:
        kernels = json.loads(file.read_text(encoding="utf-8"))["kernels"]
        found = {rows: kernels[str(rows)] for rows in ROWS}
        return found if all(rows <= PRODUCTS[name][0] for rows, name in found.items()) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
