"""The CUDA backend's products: flat kernels are the library's product, and the fastest of them serves, as measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_device import DEVICE, GPU

from hasten.cache import Cache
from hasten.model import Rows, load_model, loading
from hasten.model.cuda import dataflow
from hasten.model.cuda.backend import CudaBackend
from hasten.model.cuda.dataflow import PRODUCTS, ROWS, MeasuredLinear, choose, measured
from hasten.model.decoder import TorchBackend

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Each kernel takes as long as `TIMES` says; the kernels that were measured, in order."""
    asked: list[str] = []

    def milliseconds(product: Any, rows: Tensor, *_: Any) -> float:
        name = next(name for name, (_, known) in PRODUCTS.items() if known is product)
        asked.append(name)
        return TIMES[name](rows.shape[0])

    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    monkeypatch.setattr(dataflow, "milliseconds", milliseconds)
    yield asked


TIMES: dict[str, Callable[[int], float]] = {
    "library": lambda rows: 10.0,
    "vector": lambda rows: 4.0 * rows,
    "flat": lambda rows: 6.0 + 0.12 * rows,
}
CHOSEN = {1: "vector", 2: "flat", 4: "flat", 8: "flat", 16: "flat", 32: "library", 64: "library"}


@pytest.mark.parametrize("name", ["vector", "flat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])])
@pytest.mark.parametrize(("outputs", "inputs", "bias"), [(16, 64, False), (37, 150, True), (1, 3, False)])
def test_kernels_are_the_librarys_product(name: str, dtype: torch.dtype, outputs: int, inputs: int, bias: bool) -> None:
    most, product = PRODUCTS[name]
    weight = noise(0, outputs, inputs, dtype=dtype)
    added = noise(1, outputs, dtype=dtype) if bias else None
    for count in {1, 3, most - 1, most}:
        rows = noise(count, inputs, count, dtype=dtype).T
        ours = product(rows, weight, added)
        assert ours.dtype == dtype
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(ours, F.linear(rows, weight, added), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ["vector", "flat"])
def test_rows_that_are_not_finite_spoil_no_others(name: str) -> None:
    weight, rows = noise(0, 5, 40), noise(1, 3, 40)
    alone = PRODUCTS[name][1](rows, weight, None)
    rows[1] = torch.nan
    beside = PRODUCTS[name][1](rows, weight, None)
    assert beside[1].isnan().all() and torch.equal(beside[[0, 2]], alone[[0, 2]])


def test_the_fastest_serves_up_to_the_next_number_of_rows(clock: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    linear = measured(noise(0, 24, 16))
    assert linear.kernels == CHOSEN
    # None is measured for more rows than it knows.
    assert [clock.count(name) for name in ("library", "vector", "flat")] == [len(ROWS), 3, len(ROWS)]
    ran: list[str] = []
    watched = {
        name: (most, lambda *given, name=name: ran.append(name) or F.linear(*given))
        for name, (most, _) in PRODUCTS.items()
    }
    monkeypatch.setattr(dataflow, "PRODUCTS", watched)
    for count in (0, 1, 2, 3, 16, 17, 64, 65, 300):
        rows = noise(1, count, 16)
        assert torch.equal(linear.forward(rows), F.linear(rows, linear.weight))
    assert ran == ["library", "vector", "flat", "flat", "flat", "library", "library", "library", "library"]


def test_a_lead_within_the_noise_is_the_librarys() -> None:
    assert choose({"library": 1.0, "vector": 2.0, "flat": 0.98}) == "library"
    assert choose({"library": 1.0, "vector": 0.5, "flat": 0.6}) == "vector"


def test_a_shape_is_measured_once_and_again_where_its_record_is_no_use(clock: list[str], tmp_path: Path) -> None:
    measured(noise(0, 24, 16))
    once = len(clock)
    assert measured(noise(1, 24, 16)).kernels == CHOSEN and len(clock) == once
    measured(noise(0, 16, 24))
    measured(noise(0, 24, 16), noise(1, 24))
    assert len(clock) == 3 * once
    first, *_ = files = list((tmp_path / "gpu-products").iterdir())
    assert len(files) == 3
    record = json.loads(first.read_text())
    shape = record["subject"]["shape"]
    bias = noise(0, shape[0]) if record["subject"]["bias"] else None
    # Kernels that do not exist, that do not know so many rows, rows that are missing, half a file.
    for damaged in (
        json.dumps({**record, "kernels": {**record["kernels"], "8": "fast"}}),
        json.dumps({**record, "kernels": {**record["kernels"], "64": "vector"}}),
        json.dumps({**record, "kernels": {"1": "flat"}}),
        first.read_text()[:40],
    ):
        first.write_text(damaged)
        before = len(clock)
        assert measured(noise(0, *shape), bias).kernels == CHOSEN
        assert len(clock) == before + once


def test_a_folder_that_cannot_be_written_is_no_error(
    clock: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "file"))
    assert measured(noise(0, 24, 16)).kernels == CHOSEN


def test_the_backend_loads_models_so(
    clock: list[str], make_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataflow, "serves", lambda weight: True)
    folder = make_checkpoint("qwen2", num_hidden_layers=1).folder

    def load(backend: Any) -> Any:
        monkeypatch.setattr(loading, "choose_backend", lambda *_: backend)
        return load_model(folder, dtype="float32", device=DEVICE.type)

    model = load(CudaBackend())
    pieces = (model.layers[0].mixer.qkv, model.layers[0].mixer.out, model.layers[0].mlp.down, model.head)
    assert all(isinstance(piece, MeasuredLinear) for piece in pieces)
    rows = Rows.of(Cache(model.config.layers, model.cache_dtype, model.device).sequence(), [5, 6, 7], 0, DEVICE)
    logits = TorchBackend().forward(load(TorchBackend()), rows, None, None)
    torch.testing.assert_close(model.forward(rows), logits, atol=1e-4, rtol=0)
    # Rows of other passes must not change the kernel.
    assert not isinstance(load(CudaBackend(invariant=True)).head, MeasuredLinear)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_measurement() -> None:
    times = dataflow.measure(noise(0, 4096, 1024, dtype=torch.bfloat16), None)
    assert times.keys() == set(ROWS) and all(value > 0 for found in times.values() for value in found.values())
