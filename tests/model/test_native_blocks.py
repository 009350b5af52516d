"""Weights as GGUF files store them: exact codes and scales, products as close as int8 inputs allow, rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_blocks import expanded, of_weights, random_blocks
from hypothesis import given
from hypothesis import strategies as st
from instruction_sets import INSTRUCTION_SETS, chosen
from test_native_linear import random
from torch import Tensor

from hasten.cache import Cache
from hasten.errors import UserError
from hasten.model import Rows, load_model
from hasten.model.decoder import compose
from hasten.model.linear import StackedLinear
from hasten.model.native import NativeBackend, blocks
from hasten.model.native.blocks import KINDS, BlockLinear
from hasten.model.native.library import LIBRARY
from hasten.model.native.linear import BLOCK_FORMATS, BlockFormat, PanelLinear
from hasten.model.weights import HEAD, Blocks, Piece, Pieces, Source

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the native step was not built: no C++ compiler")

Make = Callable[..., Any]
PLAIN: tuple[BlockFormat, ...] = ("Q8_0", "Q4_0", "Q4_1")


def layer(format: BlockFormat, blocks: Tensor, bias: Tensor | None = None) -> BlockLinear:
    inputs = blocks.shape[1] // KINDS[format].bytes * KINDS[format].inputs
    return BlockLinear(format, blocks, inputs, bias, torch.float32)


def codes_of(x: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """int8 codes and a scale per `span` inputs of a row, as the native step makes them."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % span)).unflatten(1, (-1, span))
    most = padded.abs().amax(2, keepdim=True)
    codes = (padded * (127 / most).nan_to_num(0, 0, 0)).round()
    return codes, most / 127


def span(format: BlockFormat) -> int:
    """Inputs of a row that share a scale."""
    return 16 if format == "Q6_K" else 32


def representable(format: BlockFormat, rows: int, inputs: int, seed: int) -> Tensor:
    """Rows whose int8 codes stand for them exactly."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-127, 128, (rows, inputs // span(format), span(format)), generator=generator).float()
    whole[:, :, 0] = 127
    return (whole * torch.exp2(torch.randint(-9, 3, whole.shape[:2], generator=generator)).unsqueeze(2)).flatten(1)


def seen(format: BlockFormat, x: Tensor) -> Tensor:
    """What the rows are as int8 codes."""
    codes, scales = codes_of(x, span(format))
    return (codes * scales).flatten(1)


@pytest.mark.parametrize("format", BLOCK_FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (16, 2), (33, 1), (70, 3)])
def test_panels_give_the_weights_of_the_file_back(format: BlockFormat, shape: tuple[int, int]) -> None:
    outputs, blocks = shape
    stored = random_blocks(format, outputs, blocks * KINDS[format].inputs)
    assert torch.equal(layer(format, stored).dequant(), expanded(format, stored))


@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_large_weights_become_panels_in_pieces(format: BlockFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made of a weight on the way to panels is never as large as the weight is."""
    stored = random_blocks(format, 170, 512)
    monkeypatch.setattr(blocks, "AT_ONCE", 32 * stored.shape[1])
    pieces: list[int] = []
    read = KINDS[format].read
    counted = replace(KINDS[format], read=lambda block: (pieces.append(len(block)), read(block))[1])
    monkeypatch.setitem(KINDS, format, counted)
    assert torch.equal(layer(format, stored).dequant(), expanded(format, stored))
    assert pieces == [32] * 6


@pytest.mark.parametrize(("format", "bits"), zip(BLOCK_FORMATS, (8.5, 4.5, 5, 4.625, 6.5625), strict=True))
def test_panels_are_as_large_as_the_blocks(format: BlockFormat, bits: float) -> None:
    assert layer(format, random_blocks(format, 64, 768)).nbytes() == 64 * 768 * bits / 8


@given(
    format=st.sampled_from(BLOCK_FORMATS),
    outputs=st.integers(1, 100),
    blocks=st.integers(1, 4),
    rows=st.integers(1, 70),
    bias=st.booleans(),
    residual=st.booleans(),
)
def test_any_shape(format: BlockFormat, outputs: int, blocks: int, rows: int, bias: bool, residual: bool) -> None:
    inputs = blocks * KINDS[format].inputs
    stored = random_blocks(format, outputs, inputs)
    x = representable(format, rows, inputs, seed=1)
    added, offset = random(rows, outputs, seed=2), random(outputs, seed=3)
    linear = layer(format, stored, offset if bias else None)
    got = linear.forward_add(x, added) if residual else linear.forward(x)
    weight = expanded(format, stored).double()
    expected = x.double() @ weight.T + (offset if bias else 0) + (added if residual else 0)
    assert ((got - expected).abs() <= 1e-5 * (x.abs().double() @ weight.abs().T) + 1e-5).all()


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set_is_as_close_as_its_inputs_are(name: str, tmp_path: Path) -> None:
    with chosen(name, LIBRARY, tmp_path) as available:
        if not available:
            pytest.skip(f"{name} is not here")
        for format in BLOCK_FORMATS:
            weight = random(50, 512) * 0.05
            stored = of_weights(format, weight) if format in PLAIN else random_blocks(format, 50, 512)
            weight, linear = expanded(format, stored).double(), layer(format, stored)
            for rows in (1, 2, 5, 8, 13, 16, 24, 25, 33, 70):
                x = random(rows, 512, seed=rows)
                got, most = linear.forward(x).double(), (x.double() @ weight.T).abs().max()
                assert (got - seen(format, x).double() @ weight.T).abs().max() <= 1e-5 * most
                # A code is half a step from its input, at most.
                steps = codes_of(x, span(format))[1].expand(-1, -1, span(format)).flatten(1).double() / 2
                assert ((got - x.double() @ weight.T).abs() <= steps @ weight.abs().T + 1e-5 * most).all()
                # What has codes of its own is exact but for the rounding of sums.
                x = representable(format, rows, 512, seed=rows)
                exact = x.double() @ weight.T
                assert (linear.forward(x).double() - exact).abs().max() <= 2e-6 * exact.abs().max()


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_the_largest_codes_do_not_overflow(name: str, tmp_path: Path) -> None:
    with chosen(name, LIBRARY, tmp_path) as available:
        if not available:
            pytest.skip(f"{name} is not here")
        for format in BLOCK_FORMATS:
            for byte in (0, 127, 128, 255):
                stored = random_blocks(format, 32, 4096)
                blocks = stored.view(32, -1, KINDS[format].bytes)
                codes = {"Q6_K": slice(0, 208), "Q4_K": slice(4, 144), "Q4_1": slice(4, 20)}
                blocks[..., codes.get(format, slice(2, 34))] = byte
                linear, weight = layer(format, stored), expanded(format, stored).double()
                for value in (1.0, -1.0):
                    expected = torch.full((1, 4096), value).double() @ weight.T
                    got = linear.forward(torch.full((1, 4096), value)).double()
                    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * weight.abs().sum(1).max().item())


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_scales_of_any_size_are_read_exactly(name: str, tmp_path: Path) -> None:
    """Zeros, and the float16 numbers below 2^-14 that have no leading one."""
    with chosen(name, LIBRARY, tmp_path) as available:
        if not available:
            pytest.skip(f"{name} is not here")
        for scale in (0.0, 1e-7, 1e-5, 6.1e-5, 1.0, 2000.0):
            for format in BLOCK_FORMATS:
                stored = random_blocks(format, 32, 256, scale=scale)
                x = torch.zeros(1, 256)
                x[0, 5] = 1
                expected = expanded(format, stored)[:, 5]
                # What is not stored as it is, is a difference of these.
                most = expanded(format, stored).abs().max().item()
                torch.testing.assert_close(layer(format, stored).forward(x)[0], expected, rtol=1e-5, atol=1e-5 * most)


@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_a_row_is_the_same_bits_beside_any_others(format: BlockFormat) -> None:
    linear = layer(format, random_blocks(format, 80, 512), random(80, seed=3))
    x = random(70, 512, seed=1) * torch.logspace(-3, 3, 70).unsqueeze(1)
    whole = linear.forward(x)
    for rows in range(1, 71):
        assert torch.equal(linear.forward(x[:rows]), whole[:rows])
        assert torch.equal(linear.forward(x[rows - 1 : rows])[0], whole[rows - 1])


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_rows_that_are_no_numbers_spoil_themselves_only(name: str, tmp_path: Path) -> None:
    x = random(9, 256)
    spoilt = x.clone()
    for row, value in enumerate([torch.nan, torch.inf, -torch.inf, -torch.nan]):
        spoilt[2 * row, 60 * row] = value
    sound = [1, 3, 5, 7, 8]
    with chosen(name, LIBRARY, tmp_path) as available:
        if not available:
            pytest.skip(f"{name} is not here")
        for format in BLOCK_FORMATS:
            linear = layer(format, random_blocks(format, 50, 256))
            result = linear.forward(spoilt)
            assert torch.equal(result[sound], linear.forward(x)[sound])
            assert result[::2][:4].isnan().all()


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_codes_of_the_smallest_and_the_largest_rows(name: str, tmp_path: Path) -> None:
    x = random(1, 256)
    with chosen(name, LIBRARY, tmp_path) as available:
        if not available:
            pytest.skip(f"{name} is not here")
        for format in BLOCK_FORMATS:
            linear = layer(format, random_blocks(format, 32, 256, scale=1e-4))
            for power in (-45, -40, -38, -30, 0, 30, 36):
                scale = torch.tensor(10.0).pow(power).item()
                expected = (x.double() * scale) @ linear.dequant().double().T
                got = linear.forward(x * scale).double()
                assert torch.allclose(got, expected, rtol=0.1, atol=0.3 * scale + 1e-35), (format, power)


@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_what_is_no_row_of_blocks_is_refused(format: BlockFormat) -> None:
    kind = KINDS[format]
    with pytest.raises(UserError, match=f"no row of {kind.inputs + 16} weights in {format}"):
        BlockLinear(format, torch.zeros(4, kind.bytes, dtype=torch.uint8), kind.inputs + 16, None, torch.float32)
    with pytest.raises(UserError, match=f"{kind.bytes} bytes are no row"):
        BlockLinear(format, torch.zeros(4, kind.bytes, dtype=torch.uint8), 2 * kind.inputs, None, torch.float32)


def piece_of(
    weight: Tensor, *formats: BlockFormat, bias: Tensor | None = None, sizes: Sequence[int] | None = None
) -> Piece:
    """A weight as stored, cut into as many matrices as there are formats: of these sizes, or of equal ones."""
    parts = weight.chunk(len(formats)) if sizes is None else weight.split(list(sizes))
    rows = [of_weights(format, part) for format, part in zip(formats, parts, strict=True)]
    stored = tuple(Blocks(format, part, weight.shape[1]) for format, part in zip(formats, rows, strict=True))
    wide = torch.cat([expanded(format, part) for format, part in zip(formats, rows, strict=True)])
    return Piece.of(stored, lambda: wide, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backend_keeps_what_is_stored(dtype: torch.dtype) -> None:
    piece = piece_of(random(48, 64), "Q4_1", "Q4_1", bias=random(48))
    backend = NativeBackend(dtype)
    for source in (Source("qkv", 0), HEAD):
        linear = backend.linear(piece, source)
        assert isinstance(linear, BlockLinear) and linear.format == "Q4_1"
        assert torch.equal(linear.dequant(), piece.weight.to(dtype))
        assert linear.bias is not None and torch.equal(linear.bias, random(48))


def test_the_backend_keeps_values_that_are_stored_otherwise() -> None:
    backend, x = NativeBackend(torch.bfloat16), random(5, 64, seed=1)
    for bias in (None, random(80)):
        piece = piece_of(random(80, 64), "Q4_1", "Q4_1", "Q8_0", bias=bias, sizes=(48, 16, 16))
        linear = backend.linear(piece, Source("qkv", 0))
        assert isinstance(linear, StackedLinear)
        assert [(part.format, part.out_features) for part in linear.parts] == [("Q4_1", 64), ("Q8_0", 16)]
        assert torch.equal(linear.dequant(), piece.weight.bfloat16())
        assert linear.nbytes() < 80 * 64 and (linear.out_features, linear.in_features) == (80, 64)
        above, values = linear.forward(x).split((64, 16), 1)
        for got, kept, start in ((above, piece.stored[:2], 0), (values, piece.stored[2:], 64)):
            own = None if bias is None else bias[start : start + got.shape[1]]
            alone = layer(kept[0].type, torch.cat([each.rows for each in kept]), own)
            assert torch.equal(got, alone.forward(x))
        torch.testing.assert_close(linear.forward_add(x, random(5, 80)), linear.forward(x) + random(5, 80))
    for mixed in (("Q4_1", "Q8_0", "Q8_0"), ("Q4_1", "Q8_0", "Q4_0")):
        assert isinstance(backend.linear(piece_of(random(48, 64), *mixed), Source("qkv", 0)), PanelLinear)
    assert isinstance(NativeBackend(torch.bfloat16, "Q4_1").linear(piece, Source("qkv", 0)), BlockLinear)


def test_the_backend_expands_what_it_does_not_know_and_what_is_to_be_rounded() -> None:
    dense, rounded = NativeBackend(torch.bfloat16), NativeBackend(torch.bfloat16, "Q4_1", head="Q8_0")
    assert isinstance(dense.linear(piece_of(random(48, 64), "Q4_1", "Q8_0"), HEAD), PanelLinear)
    other = Piece.of((Blocks("Q2_K", torch.zeros(4, 84, dtype=torch.uint8), 256),), lambda: torch.zeros(4, 256))
    assert isinstance(dense.linear(other, HEAD), PanelLinear)
    assert rounded.linear(piece_of(random(48, 64), "Q4_1"), HEAD).format == "Q8_0"
    assert rounded.linear(piece_of(random(48, 64), "Q8_0"), Source("down", 3)).format == "Q4_1"
    # What is stored so is not rounded again.
    stored = piece_of(random(48, 64), "Q4_1")
    assert torch.equal(rounded.linear(stored, Source("down", 3)).dequant(), stored.weight.bfloat16())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_native_step_runs_on_stored_weights(dtype: str, make_checkpoint: Make) -> None:
    checkpoint = make_checkpoint("llama", hidden_size=64, intermediate_size=96)

    def stored(pieces: Pieces) -> Pieces:
        names = [name for name, piece in pieces.weights.items() if piece.weight.dim() == 2 and name != "embedding"]
        kept = {name: piece_of(pieces.weights[name].weight.float(), "Q8_0") for name in names}
        return replace(pieces, weights={**pieces.weights, **kept})

    model = load_model(checkpoint.folder, dtype, "cpu", "native", transforms=[stored])
    reference = load_model(checkpoint.folder, "float32", "cpu", "torch")
    assert isinstance(model.backend, NativeBackend) and model.backend.runs(model)

    def logits(model: Any, tokens: list[int]) -> Tensor:
        cache = Cache(model.config.layers, model.cache_dtype, model.device)
        return model.forward(Rows.of(cache.sequence(), tokens, 0), None).float()

    tokens = [3, 5, 9, 4, 17, 8, 2, 30]
    got, expected = logits(model, tokens), logits(reference, tokens)
    assert (got - expected).norm() < 0.06 * expected.norm()
    assert torch.equal(logits(model, tokens[:3]), got[:3])


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_the_native_step_runs_on_values_that_are_stored_otherwise(
    name: str, architecture: str, tmp_path: Path, make_checkpoint: Make
) -> None:
    checkpoint = make_checkpoint(architecture, hidden_size=64, intermediate_size=96)

    def stored(pieces: Pieces) -> Pieces:
        if pieces.layer != 1:
            return pieces
        config, qkv = pieces.config.layers[1], pieces.weights["qkv"]
        width, kv = config.heads * config.slots.key_width, config.slots.heads * config.slots.key_width
        kept = piece_of(qkv.weight.float(), "Q4_0", "Q4_0", "Q8_0", bias=qkv.bias, sizes=(width, kv, kv))
        return replace(pieces, weights={**pieces.weights, "qkv": kept})

    with chosen(name, LIBRARY, tmp_path) as available:
        if not available:
            pytest.skip(f"{name} is not here")
        model = load_model(checkpoint.folder, "float32", "cpu", "native", transforms=[stored])
        assert isinstance(model.layers[1].mixer.qkv, StackedLinear)
        assert isinstance(model.backend, NativeBackend) and model.backend.runs(model)

        def rows(tokens: list[int]) -> Rows:
            return Rows.of(Cache(model.config.layers, model.cache_dtype, model.device).sequence(), tokens, 0)

        tokens = [3, 5, 9, 4, 17, 8, 2, 30] * 5
        got = model.forward(rows(tokens), None)
        # The same pieces one by one, with PyTorch between them.
        torch.testing.assert_close(got, compose(model, rows(tokens), None, None), rtol=1e-4, atol=1e-4)
        for count in (1, 2, 7, 33):
            assert torch.equal(model.forward(rows(tokens[:count]), None), got[:count])
