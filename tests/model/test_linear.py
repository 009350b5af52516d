"""Packed and dense storage are the same matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.model.linear import DenseLinear, PackedLinear, can_pack, fastest_linear

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(torch.zeros(1, dtype=dtype))]
SHAPES = [(1, 1), (5, 1), (1, 7), (24, 16), (80, 48), (97, 130), (384, 256)]
ROWS = [1, 2, 5, 17, 33, 100]

pytestmark = pytest.mark.skipif(not DTYPES, reason="oneDNN cannot pack on this machine")


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both(shape: tuple[int, int], biased: bool, dtype: torch.dtype) -> tuple[PackedLinear, DenseLinear]:
    weight = noise(0, *shape, dtype=dtype) / shape[1] ** 0.5
    bias = noise(1, shape[0], dtype=dtype) if biased else None
    return PackedLinear(weight, bias), DenseLinear(weight, bias)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[ours.dtype]
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_is_dense(shape: tuple[int, int], biased: bool, dtype: torch.dtype) -> None:
    packed, dense = both(shape, biased, dtype)
    assert (packed.out_features, packed.in_features) == (dense.out_features, dense.in_features) == shape
    for count in ROWS:
        rows = noise(2, count, shape[1], dtype=dtype)
        residual = noise(3, count, shape[0], dtype=dtype)
        before = residual.clone()
        close(packed.forward(rows), dense.forward(rows))
        close(packed.forward_add(rows, residual), dense.forward_add(rows, residual))
        assert torch.equal(residual, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_matrices_err_no_more_than_dense_ones(dtype: torch.dtype) -> None:
    packed, dense = both((384, 256), True, dtype)
    rows, residual = noise(2, 50, 256, dtype=dtype), noise(3, 50, 384, dtype=dtype)
    assert dense.bias is not None
    exact = rows.double() @ dense.weight.double().T + dense.bias.double() + residual.double()

    def error(result: Tensor) -> float:
        return float((result.double() - exact).abs().mean())

    assert error(packed.forward_add(rows, residual)) <= 1.5 * error(dense.forward_add(rows, residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequant_gives_the_weight_back(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed, dense = both(shape, False, dtype)
    assert torch.equal(packed.dequant(), dense.weight)
    assert packed.dequant().dtype == dtype
    assert dense.dequant() is dense.weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_nbytes_is_the_weight_and_the_bias(dtype: torch.dtype) -> None:
    for biased in (False, True):
        packed, dense = both((24, 16), biased, dtype)
        assert packed.nbytes() == dense.nbytes() == (24 * 16 + 24 * biased) * dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_reads_views(dtype: torch.dtype) -> None:
    packed, dense = both((24, 16), True, dtype)
    residual = noise(3, 24, 5, dtype=dtype).T
    for rows in (
        noise(0, 16, 5, dtype=dtype).T,
        noise(0, 10, 16, dtype=dtype)[::2],
        noise(0, 5, 40, dtype=dtype)[:, 3:19],
        noise(0, 5, 32, dtype=dtype)[:, ::2],
    ):
        close(packed.forward(rows), dense.forward(rows))
        close(packed.forward_add(rows, residual), dense.forward_add(rows, residual))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype: torch.dtype) -> None:
    for piece in both((24, 16), True, dtype):
        nothing = torch.empty(0, 16, dtype=dtype)
        assert piece.forward(nothing).shape == (0, 24)
        assert piece.forward_add(nothing, torch.empty(0, 24, dtype=dtype)).shape == (0, 24)


def test_the_storage_follows_dtype_and_device() -> None:
    assert isinstance(fastest_linear(torch.zeros(3, 2)), PackedLinear)
    for dtype in (torch.float64, torch.float16):
        assert isinstance(fastest_linear(torch.zeros(3, 2, dtype=dtype)), DenseLinear)
    assert isinstance(fastest_linear(torch.zeros(3, 2, device="meta")), DenseLinear)


def test_the_plain_weight_may_be_a_view() -> None:
    weight = noise(0, 16, 24).T
    assert torch.equal(PackedLinear(weight).dequant(), weight)
