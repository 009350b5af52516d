"""Weights are pieces that transforms may change between the checkpoint and the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.cache import Cache
from hasten.errors import UserError
from hasten.model import Decoder, Rows, load_model
from hasten.model.checkpoint import Tensors
from hasten.model.decoder import TorchBackend
from hasten.model.linear import DenseLinear, Linear
from hasten.model.native import NativeBackend
from hasten.model.native.library import LIBRARY
from hasten.model.weights import HEAD, Blocks, Piece, Pieces, Source, Transform

Make = Callable[..., Any]
LINEARS = ("qkv", "attention_out", "gate_up", "down")
NATIVE = pytest.mark.skipif(not LIBRARY.exists(), reason="the native step was not built: no C++ compiler")
BACKENDS = ["torch", pytest.param("native", marks=NATIVE)]
KINDS = ["llama", "qwen2", "qwen3"]


def load(checkpoint: Any, *transforms: Transform, dtype: str = "float32", backend: str = "torch") -> Decoder:
    return load_model(checkpoint.folder, dtype, "cpu", backend, transforms=transforms)


def logits(model: Decoder, tokens: Sequence[int] = range(3, 30)) -> Tensor:
    sequence = Cache(model.config.layers, model.cache_dtype, model.device).sequence()
    return model.forward(Rows.of(sequence, list(tokens), 0))


def only(layer: int | None, transform: Transform) -> Transform:
    """That transform in one layer."""
    return lambda pieces: transform(pieces) if pieces.layer == layer else pieces


def change(pieces: Pieces, **weights: Piece) -> Pieces:
    return replace(pieces, weights={**pieces.weights, **weights})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_transforms_that_change_nothing_change_no_bit(kind: str, backend: str, make_checkpoint: Make) -> None:
    checkpoint = make_checkpoint(kind)
    model = load(checkpoint, change, lambda pieces: pieces, backend=backend)
    plain = load(checkpoint, backend=backend)
    assert torch.equal(logits(model), logits(plain))
    assert model.config == plain.config


def test_transforms_see_the_outside_and_then_layer_by_layer_in_their_order(make_checkpoint: Make) -> None:
    seen: list[Any] = []

    def note(name: str, pieces: Pieces) -> Pieces:
        seen.append((name, pieces.layer))
        assert pieces.config.hidden_size == 48
        return pieces

    load(make_checkpoint("llama"), partial(note, "first"), partial(note, "second"))
    assert seen == [(name, layer) for layer in (None, 0, 1, 2) for name in ("first", "second")]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_by_name(kind: str, make_checkpoint: Make) -> None:
    names: dict[int | None, set[str]] = {}

    def look(pieces: Pieces) -> Pieces:
        names[pieces.layer] = set(pieces.weights)
        for name, piece in pieces.weights.items():
            assert name in pieces.weights
            assert (piece.bias is not None) == (kind == "qwen2" and name == "qkv")
        if pieces.layer is not None:
            shapes = [tuple(pieces.weights[name].weight.shape) for name in LINEARS]
            width, kv_width = (64, 32) if kind == "qwen3" else (48, 24)
            assert shapes == [(width + 2 * kv_width, 48), (48, width), (160, 48), (48, 80)]
        return pieces

    load(make_checkpoint(kind), look)
    head_norms = {"query_norm", "key_norm"} if kind == "qwen3" else set()
    layer = {"mixer_norm", "mlp_norm", *LINEARS, *head_norms}
    assert names == {None: {"embedding", "norm", "head"}, 0: layer, 1: layer, 2: layer}


def test_a_tied_head_is_no_piece_until_a_transform_makes_one(make_checkpoint: Make) -> None:
    checkpoint = make_checkpoint("llama", tie_word_embeddings=True)

    def untie(pieces: Pieces) -> Pieces:
        assert set(pieces.weights) == {"embedding", "norm"}
        return change(pieces, head=Piece(2 * pieces.weights["embedding"].weight))

    plain = load(checkpoint, dtype="float64")
    assert plain.head.dequant() is plain.embedding
    untied = load(checkpoint, only(None, untie), dtype="float64")
    torch.testing.assert_close(logits(untied), 2 * logits(plain))


@NATIVE
def test_no_more_weights_are_held_than_are_worked_on(make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without transforms one matrix at a time; with them, one layer."""
    checkpoint, piece = make_checkpoint("llama"), Tensors.piece
    alive: list[weakref.ref[Tensor]] = []

    def watched(self: Tensors, names: list[str], *given: Any) -> Piece:
        assert [each() for each in alive] == [None] * len(alive)
        made = piece(self, names, *given)
        if "proj" in names[0]:
            alive.append(weakref.ref(made.weight))
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Tensors, "piece", watched)
        load(checkpoint, backend="native")
    assert len(alive) == 3 * len(LINEARS)
    alive.clear()

    def whole(pieces: Pieces) -> Pieces:
        assert [each() for each in alive] == [None] * len(alive)
        changed = change(pieces)
        alive.extend(weakref.ref(changed.weights[name].weight) for name in LINEARS if name in changed.weights)
        return changed

    load(checkpoint, whole, backend="native")
    assert len(alive) == 3 * len(LINEARS)


class Noting(TorchBackend):
    """Says which linear layers it was asked for."""

    def __init__(self) -> None:
        self.asked: list[Source] = []

    def linear(self, piece: Piece, source: Source) -> Linear:
        self.asked.append(source)
        return super().linear(piece, source)


def test_a_backend_is_told_which_piece_it_stores(make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Noting()
    monkeypatch.setattr("hasten.model.loading.TorchBackend", lambda: backend)
    load(make_checkpoint("llama"))
    assert backend.asked == [*(Source(name, layer) for layer in range(3) for name in LINEARS), HEAD]


def rotate(pieces: Pieces) -> Pieces:
    """The residual stream is turned by an orthogonal matrix, and norms are folded into what reads them."""
    size = pieces.config.hidden_size
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turn, weights = torch.linalg.qr(noise)[0], pieces.weights

    def reading(name: str, norm: str) -> Piece:
        return replace(weights[name], weight=weights[name].weight * weights[norm].weight @ turn)

    def writing(name: str) -> Piece:
        return replace(weights[name], weight=turn.T @ weights[name].weight)

    one = Piece(torch.ones(size, dtype=torch.float64))
    if pieces.layer is None:
        embedding = Piece(weights["embedding"].weight @ turn)
        return change(pieces, embedding=embedding, head=reading("head", "norm"), norm=one)
    return change(
        pieces,
        qkv=reading("qkv", "mixer_norm"),
        attention_out=writing("attention_out"),
        gate_up=reading("gate_up", "mlp_norm"),
        down=writing("down"),
        mixer_norm=one,
        mlp_norm=one,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_rotation_with_folded_norms_gives_the_same_logits(kind: str, make_checkpoint: Make) -> None:
    checkpoint = make_checkpoint(kind)
    rotated, plain = load(checkpoint, rotate, dtype="float64"), load(checkpoint, dtype="float64")
    assert not torch.allclose(rotated.embedding, plain.embedding)
    torch.testing.assert_close(logits(rotated), logits(plain), atol=1e-5, rtol=0)


def prune(pieces: Pieces, group: int, channels: Sequence[int], narrow: bool) -> Pieces:
    """Without one group of heads and some channels of the MLP; they become zeros where it is not `narrow`."""
    shape = pieces.config.layers[pieces.layer or 0]
    d, heads, kv_heads = shape.slots.key_width, shape.heads, shape.slots.heads
    shared = heads // kv_heads
    query = torch.arange(heads * d).view(heads, d)
    lost = query[group * shared : (group + 1) * shared].flatten()
    key = heads * d + group * d + torch.arange(d)
    gate = torch.tensor(channels)
    gone = {"qkv": torch.cat([lost, key, key + kv_heads * d]), "gate_up": torch.cat([gate, gate + shape.ffn])}
    gone |= {"attention_out": lost, "down": gate}
    changed = {}
    for name, numbers in gone.items():
        axis = 1 if name in ("attention_out", "down") else 0
        weight = pieces.weights[name].weight
        if narrow:
            kept = torch.ones(weight.shape[axis], dtype=torch.bool).index_fill(0, numbers, False)
            changed[name] = Piece(weight[kept] if axis == 0 else weight[:, kept])
        else:
            changed[name] = Piece(weight.index_fill(axis, numbers, 0.0))
    return change(pieces, **changed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)])
def test_layers_may_become_narrower(layers: tuple[int, ...], backend: str, make_checkpoint: Make) -> None:
    """Each by itself, too: then the native step, whose layers have one shape, leaves the pass to the composition."""
    checkpoint, channels = make_checkpoint("llama"), range(3, 67, 2)

    def pruning(narrow: bool) -> list[Transform]:
        return [only(layer, lambda pieces: prune(pieces, 1, channels, narrow)) for layer in layers]

    narrow, zeros = load(checkpoint, *pruning(True), backend=backend), load(checkpoint, *pruning(False))
    for layer, shape in enumerate(narrow.config.layers):
        assert (shape.heads, shape.slots.heads, shape.ffn) == ((2, 1, 48) if layer in layers else (4, 2, 80))
    assert narrow.weight_bytes() < zeros.weight_bytes()
    torch.testing.assert_close(logits(narrow), logits(zeros), atol=1e-4, rtol=0)
    if isinstance(narrow.backend, NativeBackend):
        assert narrow.backend.runs(narrow) == (len(layers) == 3)


@NATIVE
def test_invariant_numerics_refuse_what_would_be_composed(make_checkpoint: Make) -> None:
    def load_invariant(*transforms: Transform) -> Decoder:
        folder = make_checkpoint("llama").folder
        return load_model(folder, "float32", "cpu", numerics="invariant", transforms=transforms)

    def narrow(pieces: Pieces) -> Pieces:
        return prune(pieces, 1, range(16), True)

    load_invariant(*(only(layer, narrow) for layer in range(3)))
    with pytest.raises(UserError, match="invariant numerics: transforms made layers"):
        load_invariant(only(1, narrow))


@pytest.mark.parametrize("name", LINEARS)
def test_a_transform_may_make_the_linear_layer_itself(name: str, make_checkpoint: Make) -> None:
    checkpoint, made = make_checkpoint("llama"), []

    def ready(pieces: Pieces) -> Pieces:
        made.append(DenseLinear(pieces.weights[name].weight))
        # Nothing is read that has been replaced.
        kept = {other: piece for other, piece in pieces.weights.items() if other != name}
        return replace(pieces, weights=kept, linears={name: made[-1]})

    model = load(checkpoint, only(1, ready))
    layer = model.layers[1]
    assert made[0] in (*vars(layer.mixer).values(), *vars(layer.mlp).values())
    torch.testing.assert_close(logits(model), logits(load(checkpoint)), atol=1e-5, rtol=0)


def test_a_transform_may_make_the_head_itself(make_checkpoint: Make) -> None:
    checkpoint = make_checkpoint("llama", tie_word_embeddings=True)
    head = DenseLinear(torch.ones(97, 48))
    model = load(checkpoint, only(None, lambda pieces: replace(pieces, linears={"head": head})))
    assert model.head is head


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("qkv", (95, 48)),
        ("qkv", (48, 48)),
        ("qkv", (96, 40)),
        ("gate_up", (160, 40)),
        ("attention_out", (48, 36)),
        ("attention_out", (40, 48)),
        ("gate_up", (158, 48)),
        ("down", (48, 64)),
        ("down", (40, 80)),
    ],
)
def test_pieces_that_do_not_fit_are_refused(name: str, shape: tuple[int, int], make_checkpoint: Make) -> None:
    misfit = only(2, lambda pieces: change(pieces, **{name: Piece(torch.zeros(shape))}))
    with pytest.raises(UserError, match=rf"layer 2 was transformed to pieces that do not fit .*{name} \[{shape[0]}, "):
        load(make_checkpoint("llama"), misfit)


@pytest.mark.parametrize(
    ("layer", "name", "size", "clue"),
    [
        (1, "mixer_norm", 40, "layer 1 was transformed to a mixer_norm of"),
        (1, "mlp_norm", 40, "layer 1 was transformed to a mlp_norm of"),
        (1, "key_norm", 40, "layer 1 was transformed to a key_norm of"),
        (None, "norm", 40, "what stands outside the layers was transformed to a norm of"),
        (None, "head", (97, 40), "was transformed to a head of 40 inputs, not 48"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_and_heads_that_do_not_fit_are_refused(
    backend: str, layer: int | None, name: str, size: Any, clue: str, make_checkpoint: Make
) -> None:
    misfit = only(layer, lambda pieces: change(pieces, **{name: Piece(torch.ones(size))}))
    with pytest.raises(UserError, match=clue):
        load(make_checkpoint("qwen3"), misfit, backend=backend)


@pytest.mark.parametrize(
    ("layer", "name", "place"),
    [
        *((1, name, "layer 1") for name in ("mixer_norm", "mlp_norm", *LINEARS)),
        *((None, name, "what stands outside the layers") for name in ("embedding", "norm")),
    ],
)
def test_pieces_that_are_left_out_are_named(layer: int | None, name: str, place: str, make_checkpoint: Make) -> None:
    def drop(pieces: Pieces) -> Pieces:
        return replace(pieces, weights={key: piece for key, piece in pieces.weights.items() if key != name})

    with pytest.raises(UserError, match=f"^{place} was transformed to pieces without {name}, which must be there$"):
        load(make_checkpoint("llama"), only(layer, drop))


def test_a_bias_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"a weight of \[3, 2\] cannot have a bias of \[2\]"):
        Piece(torch.ones(3, 2), torch.ones(2))


def test_a_stored_piece_expands_its_weight_when_it_is_asked_for() -> None:
    asked = 0

    def expand() -> torch.Tensor:
        nonlocal asked
        asked += 1
        return torch.ones(6, 32)

    blocks = Blocks("Q4_1", torch.zeros(3, 20, dtype=torch.uint8), 32)
    piece = Piece.of((blocks, blocks), expand, torch.ones(6))
    half = piece.to(torch.bfloat16)
    assert half.stored == (blocks, blocks) and half.bias is not None and half.bias.dtype == torch.bfloat16
    assert asked == 0
    assert half.weight.dtype == torch.bfloat16 and piece.weight.shape == (6, 32)
    assert asked == 2
    with pytest.raises(UserError, match=r"a weight of \[6, 32\] cannot have a bias of \[5\]"):
        Piece.of((blocks, blocks), expand, torch.ones(5))


def test_another_weight_in_a_stored_piece_leaves_nothing_stored() -> None:
    blocks = Blocks("Q4_1", torch.zeros(3, 20, dtype=torch.uint8), 32)
    piece = Piece.of((blocks,), lambda: torch.ones(3, 32))
    turned = replace(piece, weight=2 * piece.weight)
    assert turned.stored == () and torch.equal(turned.weight, torch.full((3, 32), 2.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_residual_stream_may_become_narrower(backend: str, make_checkpoint: Make) -> None:
    """Channels that nothing writes are left out; norms make up for the smaller count."""
    kept, checkpoint = torch.arange(48) % 3 > 0, make_checkpoint("llama", rms_norm_eps=1e-12)

    def zeros(pieces: Pieces) -> Pieces:
        written = {}
        for name in {"attention_out", "down"} & set(pieces.weights):
            written[name] = Piece(pieces.weights[name].weight * kept.unsqueeze(1))
        if pieces.layer is None:
            written["embedding"] = Piece(pieces.weights["embedding"].weight * kept)
        return change(pieces, **written)

    def narrow(pieces: Pieces) -> Pieces:
        changed = {}
        for name, piece in pieces.weights.items():
            if name in ("attention_out", "down"):
                changed[name] = Piece(piece.weight[kept])
            elif "norm" in name:
                changed[name] = Piece(piece.weight[kept] * 1.5**0.5)
            else:
                changed[name] = Piece(piece.weight[:, kept])
        return change(pieces, **changed)

    model = load(checkpoint, zeros, narrow, backend=backend)
    assert model.config.hidden_size == 32
    torch.testing.assert_close(logits(model), logits(load(checkpoint, zeros)), atol=1e-4, rtol=0)
    if isinstance(model.backend, NativeBackend):
        assert model.backend.runs(model)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_may_compute_in_another_precision_and_layout(backend: str, make_checkpoint: Make) -> None:
    checkpoint = make_checkpoint("qwen2")

    def double(pieces: Pieces) -> Pieces:
        wide = {name: piece.to(torch.float64) for name, piece in pieces.weights.items() if name != "embedding"}
        if pieces.layer is None:
            wide["embedding"] = Piece(pieces.weights["embedding"].weight.T.contiguous().T)
        return change(pieces, **wide)

    assert torch.equal(logits(load(checkpoint, double, backend=backend)), logits(load(checkpoint, backend=backend)))

    def whole(pieces: Pieces) -> Pieces:
        return change(pieces, **{name: piece.to(torch.float64) for name, piece in pieces.weights.items()})

    model = load(checkpoint, whole, backend=backend)
    assert model.dtype == torch.float64
    torch.testing.assert_close(logits(model), logits(load(checkpoint)), atol=1e-4, rtol=0)
