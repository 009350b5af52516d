"""A recording model tells what its linear layers read, and is the same model otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.cache import Cache
from hasten.model import Decoder, Rows, Span, Taps, load_model
from hasten.model.native import NativeBackend
from hasten.model.native.library import LIBRARY
from hasten.model.recording import LINEARS, recording
from hasten.model.weights import HEAD, Source

Make = Callable[..., Any]
NATIVE = pytest.mark.skipif(not LIBRARY.exists(), reason="the native step was not built: no C++ compiler")
BACKENDS = ["torch", pytest.param("native", marks=NATIVE)]


@pytest.fixture(params=BACKENDS)
def model(request: pytest.FixtureRequest, make_checkpoint: Make) -> Decoder:
    return load_model(make_checkpoint("qwen2").folder, "float32", "cpu", request.param)


class Recorder:
    """Keeps what it is told, per layer in the order of the passes."""

    def __init__(self) -> None:
        self.inputs: dict[Source, list[Tensor]] = {}

    def __call__(self, source: Source, rows: Tensor) -> None:
        self.inputs.setdefault(source, []).append(rows.clone())

    def of(self, name: str, layer: int | None = None) -> Tensor:
        return torch.cat(self.inputs[Source(name, layer)])


def batch(model: Decoder) -> Rows:
    """Three sequences of unequal length, one with a past."""
    cache = Cache(model.config.layers, model.cache_dtype, model.device)
    first, second, third = (cache.sequence() for _ in range(3))
    model.forward(Rows.of(second, [7, 8, 9], 0))
    second.commit(3)
    positions = torch.tensor([0, 1, 2, 3, 4, 0])
    spans = [Span(first, 0, 3), Span(second, 3, 5), Span(third, 5, 6)]
    return Rows(torch.tensor([3, 4, 5, 6, 7, 8]), positions, spans)


def test_every_linear_layer_in_every_pass(model: Decoder) -> None:
    recorder = Recorder()
    recorded = recording(model, recorder)
    for _ in range(2):
        recorded.forward(batch(model))
    layers = [Source(name, layer) for layer in range(3) for name in LINEARS if name != "head"]
    assert list(recorder.inputs) == [*layers, HEAD]
    assert all(len(passes) == 2 for passes in recorder.inputs.values())


def test_inputs_are_those_by_hand(model: Decoder) -> None:
    recorder, rows = Recorder(), batch(model)
    taps = Taps(
        [(site, layer) for site in ("attention_input", "attention_output", "mlp_input", "output") for layer in range(3)]
    )
    wanted = [4, 0]
    logits = recording(model, recorder).forward(rows, wanted, taps)
    for index, layer in enumerate(model.layers):
        assert torch.equal(recorder.of("qkv", index), taps["attention_input", index])
        assert torch.equal(recorder.of("gate_up", index), taps["mlp_input", index])
        out, gate_up = layer.mixer.out, layer.mlp.gate_up  # type: ignore[attr-defined]
        by_hand = recorder.of("attention_out", index) @ out.dequant().T
        torch.testing.assert_close(by_hand, taps["attention_output", index], atol=1e-4, rtol=0)
        gate, up = (taps["mlp_input", index] @ gate_up.dequant().T).chunk(2, -1)
        torch.testing.assert_close(recorder.of("down", index), F.silu(gate) * up, atol=1e-4, rtol=0)
    normed = model.norm.forward(taps["output", 2][wanted])
    torch.testing.assert_close(recorder.of("head"), normed)
    torch.testing.assert_close(logits, normed @ model.head.dequant().T, atol=1e-4, rtol=0)


def test_sequences_of_a_batch_are_recorded_as_each_alone(model: Decoder) -> None:
    together, alone = Recorder(), Recorder()
    rows = batch(model)
    recording(model, together).forward(rows)
    single = recording(model, alone)
    for span in rows.spans:
        part = slice(span.start, span.stop)
        count = span.stop - span.start
        single.forward(Rows(rows.tokens[part], rows.positions[part], [Span(span.sequence, 0, count)]))
    for source in together.inputs:
        torch.testing.assert_close(together.of(source.name, source.layer), alone.of(source.name, source.layer))


def test_only_the_named_ones(model: Decoder) -> None:
    for name in LINEARS:
        recorder = Recorder()
        recording(model, recorder, [name]).forward(batch(model))
        assert {source.name for source in recorder.inputs} == {name}
        assert len(recorder.inputs) == (1 if name == "head" else 3)


def test_logits_and_the_model_itself_stay(model: Decoder) -> None:
    before = model.forward(batch(model))
    recorder = Recorder()
    recorded = recording(model, recorder)
    torch.testing.assert_close(recorded.forward(batch(model)), before, atol=1e-5, rtol=0)
    recorder.inputs.clear()
    assert torch.equal(model.forward(batch(model)), before)
    assert not recorder.inputs
    assert recorded.weight_bytes() == model.weight_bytes()
    assert (
        recorded.layers[0]
        .mixer.qkv.dequant()
        .equal(  # type: ignore[attr-defined]
            model.layers[0].mixer.qkv.dequant()  # type: ignore[attr-defined]
        )
    )
    if isinstance(model.backend, NativeBackend):
        assert model.backend.runs(model) and not model.backend.runs(recorded)
