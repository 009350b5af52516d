"""Panels of weights: the weights back from them, and the same bits for a row in every batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instruction_sets import INSTRUCTION_SETS, chosen
from torch import Tensor

from hasten.model.native.library import LIBRARY
from hasten.model.native.linear import FORMATS, Format, PanelLinear

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the native step was not built: no C++ compiler")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (33, 40), (70, 131), (96, 256)])
def test_panels_give_their_weights_back(format: Format, shape: tuple[int, int]) -> None:
    weight = random(*shape)
    back = PanelLinear(weight, None, format).dequant()
    if format == "float32":
        assert torch.equal(back, weight)
    else:
        assert torch.equal(back, weight.bfloat16().float())


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
    if format == "bfloat16":
        x = x.bfloat16().float()
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
