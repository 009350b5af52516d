"""Matrices of heads in blocks: what is written is read, cut and stacked as it is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file

from hasten.errors import UserError
from hasten.methods.heads.files import read_pieces, require_shape, save
from hasten.methods.heads.pieces import columns, require_store, rounded, stacked, with_bias
from hasten.model import Decoder
from hasten.model.loading import load_model
from hasten.model.native.blocks import BlockLinear
from hasten.model.weights import HEAD

WIDTH = 96
STORED = ("q8_0", "q4_1")


def drawn(outputs: int = 24, inputs: int = WIDTH, seed: int = 0) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) / inputs**0.5


@pytest.mark.parametrize("store", STORED)
def test_the_file_has_ggufs_blocks(tmp_path: Path, store: str) -> None:
    """By the format's own package."""
    weight = drawn()
    save(tmp_path, {}, {"a.weight": rounded(weight, store)})
    blocks = load_file(tmp_path / "model.safetensors")[f"a.weight.{store}"]
    expected = torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType[store.upper()]))
    piece = read_pieces(tmp_path / "model.safetensors")["a.weight"]
    assert piece.shape == (24, WIDTH)
    torch.testing.assert_close(piece.weight, expected, rtol=0, atol=1e-7)
    assert (piece.weight - weight).abs().max() < (0.01 if store == "q8_0" else 0.05)


@pytest.mark.parametrize("store", STORED)
def test_parts_are_cut_and_stacked_as_they_are_stored(store: str) -> None:
    one, other = rounded(drawn(), store), rounded(drawn(seed=1), store)
    both = stacked([columns(one, 32, 96), columns(other, 32, 96)], torch.ones(48))
    assert both.stored and torch.equal(both.weight, torch.cat([one.weight[:, 32:], other.weight[:, 32:]]))
    assert both.bias is not None and not columns(one, 16, 96).stored
    assert torch.equal(columns(one, 16, 96).weight, one.weight[:, 16:])
    assert torch.equal(with_bias(one, torch.ones(24)).weight, one.weight)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("store", STORED)
def test_both_backends_compute_what_is_stored(tiny: Path, store: str, backend: str) -> None:
    model = load_model(tiny, "float32", backend=backend)
    assert isinstance(model, Decoder)
    piece, rows = with_bias(rounded(drawn(), store), torch.ones(24)), drawn(5, seed=3)
    linear = model.backend.linear(piece.to(torch.float32), HEAD)
    assert isinstance(linear, BlockLinear) == (backend == "native")
    expected = rows @ piece.weight.T + 1
    assert (linear.forward(rows) - expected).norm() < 0.02 * (expected - 1).norm()


def test_what_is_no_whole_blocks_is_stored_plainly() -> None:
    piece = rounded(drawn(inputs=40), "q8_0")
    assert not piece.stored and piece.weight.dtype == torch.bfloat16
    assert not rounded(drawn(), "bf16").stored


def test_damaged_blocks_are_named(tmp_path: Path) -> None:
    rows = rounded(drawn(), "q8_0").stored[0].rows.clone()
    for broken, told in (
        (rows[:, :-1].contiguous(), "no whole blocks"),
        (rows.int(), "no whole blocks"),
        (torch.full_like(rows, 255), "NaN"),
    ):
        save_file({"a.q8_0": broken}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=f"a.q8_0 holds {told}"):
            read_pieces(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"must be \[24, 95\]"):
        require_shape(tmp_path, "a", rounded(drawn(), "q8_0"), 24, 95)
    with pytest.raises(UserError, match="store must be bf16, q8_0 or q4_1, not 'q2_k'"):
        require_store("q2_k")
