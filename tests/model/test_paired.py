"""Layers of drafters: attention that reads a token beside each row, and norms that are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import INSTRUCTION_SETS, chosen
from torch import Tensor

from hasten.cache import Cache
from hasten.model import Decoder, LayerConfig, ModelConfig, Rows, Span, Taps
from hasten.model.assembly import assemble
from hasten.model.decoder import Backend, TorchBackend
from hasten.model.linear import DenseLinear
from hasten.model.native import NativeBackend
from hasten.model.native.library import LIBRARY
from hasten.model.weights import Piece, Pieces

HIDDEN, HEADS, KV, WIDTH, FFN, WORDS, SAID = 32, 4, 2, 8, 48, 40, 24
CONFIG = ModelConfig(
    "paired", WORDS, HIDDEN, 64, 1e-5, False, (LayerConfig.attention(HEADS, KV, WIDTH, FFN),), (1.0, 0.3, 0.1, 0.03)
)
needs_native = pytest.mark.skipif(not LIBRARY.exists(), reason="the native step was not built: no C++ compiler")
BACKENDS = [
    pytest.param(lambda: TorchBackend(), torch.float32, id="torch"),
    pytest.param(lambda: NativeBackend(torch.float32), torch.float32, id="float32", marks=needs_native),
    pytest.param(lambda: NativeBackend(torch.bfloat16), torch.bfloat16, id="bfloat16", marks=needs_native),
    pytest.param(lambda: NativeBackend(torch.bfloat16, "Q8_0", "Q8_0"), torch.bfloat16, id="int8", marks=needs_native),
    pytest.param(lambda: NativeBackend(torch.bfloat16, "Q4_1", "Q8_0"), torch.bfloat16, id="int4", marks=needs_native),
]
KINDS = ["paired", "paired without norm of states", "without norms"]


def decoder(kind: str, backend: Backend, dtype: torch.dtype = torch.float32) -> Decoder:
    """A layer of random weights, which says fewer tokens than it reads."""
    draw = torch.Generator().manual_seed(3)

    def piece(*shape: int) -> Piece:
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.3
        return Piece((scale * torch.randn(shape, generator=draw) + (len(shape) == 1)).to(dtype))

    paired = kind != "without norms"
    layer = {
        "qkv": piece((HEADS + 2 * KV) * WIDTH, 2 * HIDDEN if paired else HIDDEN),
        "attention_out": piece(HIDDEN, HEADS * WIDTH),
        "mlp_norm": piece(HIDDEN),
        "gate_up": piece(2 * FFN, HIDDEN),
        "down": piece(HIDDEN, FFN),
        "mixer_norm": piece(HIDDEN),
    }
    outside = {"embedding": piece(WORDS, HIDDEN), "head": piece(SAID, HIDDEN), "norm": piece(HIDDEN)}
    token_norm = {"token_norm": piece(HIDDEN)} if paired else {}
    pieces = (
        Pieces(CONFIG, None, outside, without=frozenset() if paired else frozenset({"norm"})),
        Pieces(CONFIG, 0, layer | token_norm, without=frozenset() if kind == "paired" else frozenset({"mixer_norm"})),
    )
    return assemble(CONFIG, pieces, backend, torch.float32)


def by_hand(model: Decoder, states: Tensor, beside: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Logits, and the residual stream behind the layer, of a causal chain, from what the model's weights stand for."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + CONFIG.norm_eps).rsqrt() * weight.float()

    layer, x = model.layers[0], states
    read = x if kind != "paired" else norm(x, layer.mixer_norm.weight)
    if kind != "without norms":
        read = torch.cat([norm(model.embedding[beside].float(), layer.token_norm.weight), read], -1)
    qkv = (read @ layer.mixer.qkv.dequant().float().T).view(len(x), -1, WIDTH)
    angle = torch.arange(len(x))[:, None] * torch.tensor(CONFIG.inverse_frequencies).repeat(2)
    half = torch.cat([-qkv[..., WIDTH // 2 :], qkv[..., : WIDTH // 2]], -1)
    turned = qkv * angle.cos()[:, None] + half * angle.sin()[:, None]
    queries, keys, values = turned[:, :HEADS], turned[:, HEADS : HEADS + KV], qkv[:, HEADS + KV :]
    keys, values = (each.repeat_interleave(HEADS // KV, 1) for each in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", queries, keys) / WIDTH**0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf).softmax(-1)
    x = x + torch.einsum("hqk,khd->qhd", scores, values).flatten(1) @ layer.mixer.out.dequant().float().T
    gate, up = (norm(x, layer.mlp_norm.weight) @ layer.mlp.gate_up.dequant().float().T).chunk(2, -1)
    x = x + (F.silu(gate) * up) @ layer.mlp.down.dequant().float().T
    last = x if kind == "without norms" else norm(x, model.norm.weight)
    return last @ model.head.dequant().float().T, x


def rows(spans: list[Span], states: Tensor, beside: Tensor, positions: Tensor) -> Rows:
    return Rows(torch.full((len(states),), -1), positions, spans, states, beside)


def given(count: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(8)
    return torch.randn(count, HIDDEN, generator=draw), torch.randint(0, WORDS, (count,), generator=draw)


def new_cache(model: Decoder) -> Cache:
    return Cache(model.config.layers, model.cache_dtype, model.device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_it_is_plain_arithmetic(backend, dtype, kind):
    model = decoder(kind, backend(), dtype)
    states, beside = given(21)
    taps = Taps([("output", 0), ("attention_input", 0), ("final_norm", 0)])
    sequence = new_cache(model).sequence()
    logits = model.forward(rows([Span(sequence, 0, 21)], states, beside, torch.arange(21)), taps=taps)
    expected, behind = by_hand(model, states, beside, kind)
    assert logits.shape == (21, SAID)
    close = 1e-5 if dtype == torch.float32 else 0.04
    assert (logits - expected).norm() < close * expected.norm()
    assert (taps["output", 0].float() - behind).norm() < close * behind.norm()
    assert taps["attention_input", 0].shape == (21, HIDDEN)
    if kind == "without norms":
        torch.testing.assert_close(taps["attention_input", 0].float(), states.to(dtype).float())
        assert torch.equal(taps["final_norm", 0], taps["output", 0])


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS[1:])
def test_a_row_is_the_same_bits_beside_any_others(backend, dtype, kind):
    model, (states, beside) = decoder(kind, backend(), dtype), given(21)
    assert model.backend.runs(model)
    cache, places = new_cache(model), torch.arange(21)
    whole = model.forward(rows([Span(cache.sequence(), 0, 21)], states, beside, places))
    one, other = cache.sequence(), cache.sequence()
    for start, stop in ((0, 1), (1, 9), (9, 21)):
        part = slice(start, stop)
        packed = rows(
            [Span(one, 0, stop - start), Span(other, stop - start, stop - start + 3)],
            torch.cat([states[part], states[:3]]), torch.cat([beside[part], beside[:3]]),
            torch.cat([places[part], places[:3]]),
        )  # fmt: skip
        logits = model.forward(packed)
        assert torch.equal(logits[: stop - start], whole[part]) and torch.equal(logits[stop - start :], whole[:3])
        one.commit(stop - start)


@needs_native
def test_every_instruction_set_agrees(tmp_path: Path) -> None:
    states, beside = given(13)
    sets = 0
    for name in INSTRUCTION_SETS:
        with chosen(name, LIBRARY, tmp_path) as available:
            if not available:
                continue
            sets += 1
            for backend, dtype in (each.values for each in BACKENDS[1:]):
                model = decoder("paired", backend(), dtype)
                span = Span(new_cache(model).sequence(), 0, 13)
                logits = model.forward(rows([span], states, beside, torch.arange(13)))
                expected, _ = by_hand(model, states, beside, "paired")
                assert (logits - expected).norm() < (1e-5 if dtype == torch.float32 else 0.04) * expected.norm(), name
    assert sets


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS[:2])
def test_tokens_beside_must_be_there(backend, dtype):
    model, (states, beside) = decoder("paired", backend(), dtype), given(3)
    span = Span(new_cache(model).sequence(), 0, 3)
    alone = Rows(torch.full((3,), -1), torch.arange(3), [span], states)
    with pytest.raises(ValueError, match="beside"):
        model.forward(alone)
    for wrong in (WORDS, -1):
        beside[1] = wrong
        with pytest.raises(IndexError):
            model.forward(rows([span], states, beside, torch.arange(3)))


@needs_native
def test_a_linear_layer_of_another_kind_is_composed():
    states, beside = given(9)
    logits = []
    for other in (False, True):
        model = decoder("paired", NativeBackend(torch.float32))
        if other:
            model.layers[0].mixer.qkv = DenseLinear(model.layers[0].mixer.qkv.dequant())
        assert model.backend.runs(model) is not other
        span = Span(new_cache(model).sequence(), 0, 9)
        logits.append(model.forward(rows([span], states, beside, torch.arange(9))))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)
