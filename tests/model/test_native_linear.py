"""Panels of weights: exact codes back from them, exact integer products, the same bits for a row in every batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instruction_sets import INSTRUCTION_SETS, chosen
from torch import Tensor

from hasten.model.native.library import LIBRARY
from hasten.model.native.linear import FORMATS, GROUP, Format, PanelLinear, quantise_int4, quantise_int8

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the native step was not built: no C++ compiler")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes_of(x: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """int8 codes and a scale per `span` inputs of a row, as the native step makes them."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % span)).unflatten(1, (-1, span))
    most = padded.abs().amax(2, keepdim=True)
    codes = (padded * (127 / most).nan_to_num(0, 0, 0)).round()
    return codes, most / 127


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (33, 40), (70, 131), (96, 256)])
def test_panels_give_their_weights_back(format: Format, shape: tuple[int, int]) -> None:
    weight = random(*shape)
    back = PanelLinear(weight, None, format).dequant()
    if format == "float32":
        assert torch.equal(back, weight)
    elif format == "bfloat16":
        assert torch.equal(back, weight.bfloat16().float())
    elif format == "int8":
        codes, scales = quantise_int8(weight)
        assert torch.equal(back, codes * scales.unsqueeze(1))
        assert (back - weight).abs().max() <= scales.max() / 2 + 1e-6
    else:
        codes, scales = quantise_int4(weight)
        wide = (codes.float() - 8) * scales.float().repeat_interleave(GROUP, 1)
        assert torch.equal(back, wide[:, : shape[1]])


def test_int4_finds_a_better_end_of_the_scale_than_the_largest_weight() -> None:
    weight = random(64, 512)
    codes, scales = quantise_int4(weight)
    error = ((codes.float() - 8) * scales.float().repeat_interleave(GROUP, 1) - weight).square().sum()
    groups = weight.unflatten(1, (-1, GROUP))
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    plain = (largest / -8).bfloat16().float()
    unsearched = ((groups / plain).round().clamp(-8, 7) * plain - groups).square().sum()
    assert error < 0.97 * unsearched


def test_int4_of_zeros_is_zeros() -> None:
    linear = PanelLinear(torch.zeros(20, 70), None, "int4")
    assert torch.equal(linear.dequant(), torch.zeros(20, 70))
    assert torch.equal(linear.forward(random(3, 70)), torch.zeros(3, 20))


@given(
    format=st.sampled_from(FORMATS),
    outputs=st.integers(1, 100),
    inputs=st.integers(1, 200),
    rows=st.integers(1, 64),
    bias=st.booleans(),
    residual=st.booleans(),
)
def test_any_shape(format: Format, outputs: int, inputs: int, rows: int, bias: bool, residual: bool) -> None:
    x, added = random(rows, inputs, seed=1), random(rows, outputs, seed=2)
    offset = random(outputs, seed=3) if bias else None
    linear = PanelLinear(random(outputs, inputs), offset, format)
    got = linear.forward_add(x, added) if residual else linear.forward(x)
    # What the codes stand for, multiplied in float64: integer products are exact, the others nearly.
    if format == "bfloat16":
        x = x.bfloat16().float()
    elif format == "int8":
        codes, scales = codes_of(x, inputs)
        x = (codes * scales).flatten(1)
    elif format == "int4":
        codes, scales = codes_of(x, GROUP)
        x = (codes * scales).flatten(1)[:, :inputs]
    expected = x.double() @ linear.dequant().double().T
    if bias:
        expected += offset
    if residual:
        expected += added
    torch.testing.assert_close(got.double(), expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_is_the_same_bits_beside_any_others(format: Format) -> None:
    linear = PanelLinear(random(80, 190), random(80, seed=3), format)
    x = random(64, 190, seed=1) * torch.logspace(-3, 3, 64).unsqueeze(1)
    whole = linear.forward(x)
    for rows in range(1, 65):
        assert torch.equal(linear.forward(x[:rows]), whole[:rows])
        assert torch.equal(linear.forward(x[rows - 1 : rows])[0], whole[rows - 1])


def test_a_wide_int8_sum_does_not_overflow() -> None:
    linear = PanelLinear(torch.ones(32, 16384), None, "int8")
    torch.testing.assert_close(linear.forward(torch.ones(2, 16384)), torch.full((2, 32), 16384.0))
    torch.testing.assert_close(linear.forward(-torch.ones(2, 16384)), torch.full((2, 32), -16384.0))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_rows_that_are_no_numbers_spoil_themselves_only(name: str, tmp_path: Path) -> None:
    x = random(9, 150)
    spoilt = x.clone()
    for row, value in enumerate([torch.nan, torch.inf, -torch.inf, -torch.nan]):
        spoilt[2 * row, 40 * row] = value
    sound = [1, 3, 5, 7, 8]
    with chosen(name, LIBRARY, tmp_path) as available:
        if not available:
            pytest.skip(f"{name} is not here")
        for format in FORMATS:
            linear = PanelLinear(random(50, 150), None, format)
            result = linear.forward(spoilt)
            assert torch.equal(result[sound], linear.forward(x)[sound])
            assert not result[::2][:4].isfinite().any()


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_codes_of_the_smallest_and_the_largest_rows(format: Format, name: str, tmp_path: Path) -> None:
    x = random(1, 128)
    with chosen(name, LIBRARY, tmp_path) as available:
        if not available:
            pytest.skip(f"{name} is not here")
        linear = PanelLinear(random(32, 128), None, format)
        for power in (-45, -40, -38, -30, 0, 30, 36):
            scale = torch.tensor(10.0).pow(power).item()
            expected = (x.double() * scale) @ linear.dequant().double().T
            got = linear.forward(x * scale).double()
            assert torch.allclose(got, expected, rtol=0.1, atol=0.3 * scale + 1e-35), power


def test_int4_of_weights_whose_squares_overflow() -> None:
    weight = random(20, 130)
    huge, codes = quantise_int4(weight * 1e25), quantise_int4(weight)
    assert torch.allclose(huge[1].float() / 1e25, codes[1].float(), rtol=0.5)
    linear = PanelLinear(weight * 1e25, None, "int4")
    assert torch.allclose(linear.dequant() / 1e25, weight, atol=0.35)
