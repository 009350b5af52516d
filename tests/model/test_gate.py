"""A gate in front of feed-forward layers: what passes by, and that it is the same for a row whoever is beside it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from hasten.cache import Cache
from hasten.model import Decoder, Rows, Span, load_model
from hasten.model.gate import Gate, compose_gated, cosine
from hasten.model.native import NativeBackend
from hasten.model.native.library import LIBRARY

BACKENDS = ["torch", *(["native"] if LIBRARY.exists() else [])]
TEXTS = [
    [number * 13 % 90 + 2 for number in range(start, start + length)] for start, length in ((1, 9), (4, 1), (9, 30))
]
LAYERS = 6


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint("llama", num_hidden_layers=LAYERS)


def loaded(checkpoint, backend: str, dtype: str = "float32") -> Decoder:
    model = load_model(checkpoint.folder, dtype, backend=backend)
    assert isinstance(model, Decoder)
    return model


def rows_of(model: Decoder, texts: Sequence[Sequence[int]]) -> Rows:
    """Whole texts, one behind the other."""
    cache = Cache(model.config.layers, model.cache_dtype, model.device)
    starts = [sum(map(len, texts[:number])) for number in range(len(texts))]
    spans = [Span(cache.sequence(), start, start + len(text)) for start, text in zip(starts, texts, strict=True)]
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    return Rows(torch.tensor([token for text in texts for token in text]), positions, spans)


def gate(threshold: float, run: int = 2, **changes: int) -> Gate:
    channels = torch.ones(48)
    channels[[3, 11]] = 0.0
    return Gate(**{"first": 1, "last": LAYERS - 2, **changes}, run=run, threshold=threshold, channels=channels)


def forward(model: Decoder, rows: Rows, wanted: Sequence[int] | None, gate: Gate, may: Tensor) -> tuple[Tensor, Tensor]:
    compute = model.backend.gated if isinstance(model.backend, NativeBackend) else compose_gated
    return compute(model, rows, wanted, gate, may)


def as_written(reference: LlamaForCausalLM, text: Sequence[int], gate: Gate, may: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's loop over a text with the modules of transformers: feed-forward results are masked, row by row."""
    inner, skipped = reference.model, torch.zeros(LAYERS, len(text), dtype=torch.bool)
    with torch.inference_mode():
        x = inner.embed_tokens(torch.tensor([list(text)]))
        places = torch.arange(len(text)).unsqueeze(0)
        angles = inner.rotary_emb(x, places)
        mask = torch.full((len(text), len(text)), -torch.inf).triu(1)[None, None]
        left = [0] * len(text)
        for number, layer in enumerate(inner.layers):
            attended = layer.self_attn(layer.input_layernorm(x), angles, mask)[0]
            h = x + attended
            y = h + layer.mlp(layer.post_attention_layernorm(h))
            x = y.clone()
            if not gate.first <= number <= gate.last:
                continue
            for row in range(len(text)):
                if left[row]:
                    x[0, row], skipped[number, row] = h[0, row], True
                    left[row] -= 1
                elif may[row]:
                    one, other = h[0, row] * gate.channels, y[0, row] * gate.channels
                    if torch.cosine_similarity(one, other, 0) >= gate.threshold:
                        left[row] = gate.run
        return reference.lm_head(inner.norm(x))[0], skipped


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("run", [1, 2, 9])
def test_it_is_the_papers_loop(checkpoint, backend, run):
    model = loaded(checkpoint, backend)
    text, may = TEXTS[2], torch.arange(30) >= 4
    for threshold in (0.5, 0.7, 0.85):
        logits, skipped = forward(model, rows_of(model, [text]), None, gate(threshold, run), may)
        expected, passed = as_written(checkpoint.reference, text, gate(threshold, run), may)
        assert torch.equal(skipped, passed)
        assert 0 < skipped.sum() < (LAYERS - 2) * 26
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
        assert not skipped[:, :4].any() and not skipped[[0, -1]].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_closed_gate_is_the_default_forward(checkpoint, backend):
    model = loaded(checkpoint, backend)
    may = torch.ones(sum(map(len, TEXTS)), dtype=torch.bool)
    logits, skipped = forward(model, rows_of(model, TEXTS), [3, 39], gate(1.1), may)
    assert not skipped.any()
    expected = model.forward(rows_of(model, TEXTS), [3, 39])
    if backend == "native":
        assert torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert not forward(model, rows_of(model, TEXTS), [], gate(-1.0), ~may)[1].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.skipif("native" not in BACKENDS, reason="no native library")
def test_rows_do_not_depend_on_their_neighbours(checkpoint, dtype):
    """To the bit, though some of a batch pass by layers that the others go through."""
    model = loaded(checkpoint, "native", dtype)
    may = torch.arange(sum(map(len, TEXTS))) % 7 != 3
    together, passed = forward(model, rows_of(model, TEXTS), None, gate(0.7), may)
    assert passed.any() and not passed[1:-1].all(1).any()
    start = 0
    for text in TEXTS:
        own = slice(start, start + len(text))
        alone, skipped = forward(model, rows_of(model, [text]), None, gate(0.7), may[own])
        assert torch.equal(alone, together[own]) and torch.equal(skipped, passed[:, own])
        start += len(text)


def test_gathered_rows_are_masked_rows(checkpoint):
    """A batch whose rows go through layers in part gives what each text gives alone."""
    model = load_model(checkpoint.folder, "float32", backend="torch")
    assert isinstance(model, Decoder)
    may = torch.ones(sum(map(len, TEXTS)), dtype=torch.bool)
    together, passed = compose_gated(model, rows_of(model, TEXTS), None, gate(0.6), may)
    start = 0
    for text in TEXTS:
        own = slice(start, start + len(text))
        alone, skipped = compose_gated(model, rows_of(model, [text]), None, gate(0.6), may[own])
        torch.testing.assert_close(alone, together[own], atol=1e-5, rtol=1e-5)
        assert torch.equal(skipped, passed[:, own])
        start += len(text)


def test_cosines_leave_channels_out():
    one, other = torch.tensor([[1.0, 2.0, 100.0]]), torch.tensor([[2.0, -1.0, 100.0]])
    assert cosine(one, other, torch.ones(3)).item() > 0.999
    assert cosine(one, other, torch.tensor([1.0, 1.0, 0.0])).item() == 0.0
