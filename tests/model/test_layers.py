"""Pieces of a layer: norms that overflow, positions of several axes, a layer that reads another one's slots."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding, apply_rotary_pos_emb

from hasten.cache import Cache
from hasten.model import Decoder, Rows, SlotsOf, Span, load_model
from hasten.model.layers import Layer, Pass, Rotary, overflow
from hasten.model.native.library import LIBRARY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_overflow_is_of_the_squares(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    rows = torch.ones(3, 64, dtype=dtype)
    rows[1] = largest
    found = overflow(rows)
    assert found.dtype == dtype and found.shape == (3, 1)
    # Half precision is squared in float32, where nothing of it overflows.
    assert found.isnan().flatten().tolist() == [False, dtype != torch.float16, False]
    assert not torch.nn.functional.rms_norm(rows, (64,))[found.isnan().flatten()].any()
    assert overflow(torch.full((1, 4), torch.inf, dtype=dtype)).isnan().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [1e20, -1e38])
def test_a_row_that_overflows_spoils_itself_only(dtype: str, value: float, make_checkpoint: Callable[..., Any]) -> None:
    model = load_model(make_checkpoint("llama").folder, dtype, "cpu", "torch")
    cache = Cache(model.config.layers, model.cache_dtype, model.device)

    def logits() -> torch.Tensor:
        spans = [Span(cache.sequence(), 0, 1), Span(cache.sequence(), 1, 3)]
        return model.forward(Rows(torch.tensor([5, 3, 4]), torch.tensor([0, 0, 1]), spans))

    sound = logits()
    assert sound.isfinite().all()
    model.embedding[5] = value
    spoilt = logits()
    assert spoilt[0].isnan().all()
    assert torch.equal(spoilt[1:], sound[1:])


SECTIONS = (2, 3, 3)
AXES = [axis for axis, count in enumerate(SECTIONS) for _ in range(count)]


def places(rows: int) -> Tensor:
    """Time, height and width of each row, int64 [rows, 3]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 500, (rows, 3), generator=generator).sort(0).values


def test_positions_of_several_axes_turn_as_transformers_do() -> None:
    """Qwen2-VL: each section of the frequencies turns by one of time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(SECTIONS)}
    config = Qwen2VLTextConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope)
    theirs, positions = Qwen2VLRotaryEmbedding(config), places(7)
    rotary = Rotary(theirs.inv_freq, 1.0, AXES)
    generator = torch.Generator().manual_seed(1)
    heads = torch.randn(7, 4, 16, generator=generator)
    cos, sin = theirs(heads, positions.T.unsqueeze(1))
    expected, _ = apply_rotary_pos_emb(heads.unsqueeze(0), heads.unsqueeze(0), cos, sin, unsqueeze_dim=2)
    turned = rotary.rotate(heads, rotary.angles(positions, torch.float32))
    torch.testing.assert_close(turned, expected[0], atol=1e-5, rtol=0)
    alike = positions[:, :1].expand(-1, 3)
    for one, other in zip(rotary.angles(alike, torch.float32), rotary.angles(alike[:, 0], torch.float32), strict=True):
        assert torch.equal(one, other)


def with_axes(model: Decoder) -> Decoder:
    """The model with a rope of three axes."""
    frequencies = torch.tensor(model.config.inverse_frequencies)
    half = len(frequencies)
    axes = [*range(3)] * half
    rotary, layers = Rotary(frequencies, 1.0, axes[:half]), []
    for layer in model.layers:
        own: Any = copy(layer)
        own.mixer = copy(own.mixer)
        own.mixer.rotary = rotary
        layers.append(own)
    return replace(model, layers=layers, config=replace(model.config, rope_axes=tuple(axes[:half])))


@pytest.mark.skipif(not LIBRARY.exists(), reason="the native step was not built: no C++ compiler")
@pytest.mark.parametrize("window", [None, 300])
def test_the_native_step_knows_positions_of_several_axes(
    window: int | None, make_checkpoint: Callable[..., Any]
) -> None:
    """Also where the first axis decides what a window shows."""
    folder = make_checkpoint("qwen2").folder
    logits = []
    for backend in ("torch", "native"):
        model = with_axes(load_model(folder, "float32", "cpu", backend))
        config = replace(model.config, layers=tuple(replace(layer, window=window) for layer in model.config.layers))
        model = replace(model, config=config)
        sequence = Cache(config.layers, model.cache_dtype, model.device).sequence()
        positions = places(9)
        found = []
        for start, stop in ((0, 4), (4, 9)):
            tokens = torch.arange(start, stop) + 3
            found.append(model.forward(Rows(tokens, positions[start:stop], [Span(sequence, 0, stop - start)])))
            sequence.commit(stop - start)
        logits.append(torch.cat(found))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=0)


class Reader:
    """Attends to the slots of another layer: only queries are its own."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention

    def forward_add(self, x: Tensor, residual: Tensor, layer: int, step: Pass) -> Tensor:
        queries, _, _ = self.attention.project(x, step.angles(self.attention.rotary))
        outs = [
            span.sequence.attend(layer, queries[span.start : span.stop], mask)[0].flatten(1)
            for span, mask in zip(step.spans, step.masks, strict=True)
        ]
        return self.attention.out.forward_add(torch.cat(outs), residual)

    def nbytes(self) -> int:
        return self.attention.nbytes()


def test_a_layer_may_read_the_slots_of_another(make_checkpoint: Callable[..., Any]) -> None:
    """Shared keys and values take no memory of their own, and give what a layer with the same ones gives."""
    model = load_model(make_checkpoint("llama").folder, "float64", "cpu", "torch")
    first, second, *rest = model.layers
    # The second layer reads what the first one wrote, as if it had made the same keys and values itself.
    own: Any = second.mixer

    class Same(Reader):
        def forward_add(self, x: Tensor, residual: Tensor, layer: int, step: Pass) -> Tensor:
            queries, _, _ = own.project(x, step.angles(own.rotary))
            ((block, _),) = step.spans[0].sequence.memory(0) or []
            keys, values = block.keys[0], block.values[0]
            start, stop = int(step.positions[0]), int(step.positions[-1]) + 1
            given = keys[:, start:stop].transpose(0, 1), values[:, start:stop].transpose(0, 1)
            return own.out.forward_add(own.mix(layer, queries, *given, step), residual)

    def answer(mixer: Reader, keeps: Any) -> tuple[Tensor, int]:
        layer = Layer(1, second.mixer_norm, mixer, second.mlp_norm, second.mlp)
        shapes = model.config.layers
        config = replace(model.config, layers=(shapes[0], replace(shapes[1], keeps=keeps), *shapes[2:]))
        changed = replace(model, config=config, layers=[first, layer, *rest])
        sequence = Cache(config.layers, model.cache_dtype, model.device).sequence()
        logits = []
        for start, stop in ((0, 5), (5, 6), (6, 9)):
            logits.append(changed.forward(Rows.of(sequence, list(range(start + 3, stop + 3)), start)))
            sequence.commit(stop - start)
        return torch.cat(logits), sequence.nbytes()

    shared, fewer = answer(Reader(own), SlotsOf(0))
    copied, more = answer(Same(own), model.config.layers[1].keeps)
    torch.testing.assert_close(shared, copied, atol=1e-9, rtol=0)
    assert fewer < more
