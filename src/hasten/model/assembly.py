"""Builds a decoder from its pieces, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce

import torch

from hasten.errors import UserError
from hasten.model.config import LayerConfig, ModelConfig
from hasten.model.decoder import Backend, Decoder
from hasten.model.layers import Attention, GatedMLP, Layer, RMSNorm, Rotary
from hasten.model.linear import Linear
from hasten.model.weights import HEAD, Piece, Pieces, Source, Transform


def assemble(
    config: ModelConfig,
    pieces: Iterable[Pieces],
    backend: Backend,
    cache_dtype: torch.dtype,
    transforms: Sequence[Transform] = (),
) -> Decoder:
    """A decoder whose linear layers the backend stores.

    Args:
        config: of the checkpoint; the decoder's has the widths that the transforms leave.
        pieces: those outside the layers, then layer by layer. Each is built before the next is asked for.
        transforms: applied to each in this order.

    Raises:
        UserError: a transform leaves widths that do not fit each other.
    """
    changed = map(lambda each: reduce(lambda given, transform: transform(given), transforms, each), pieces)
    outside = next(changed)
    embedding = outside.weights["embedding"].weight
    frequencies = torch.tensor(config.inverse_frequencies, dtype=torch.float32, device=embedding.device)
    if embedding.dtype == torch.float64:
        frequencies = frequencies.double()
    rotary = Rotary(frequencies, config.rope_factor)
    layers, shapes = [], []
    # By map, as a loop's variable would hold one layer's weights while the next one's are read.
    for layer, shape in map(lambda each: _layer(each, backend, rotary), changed):
        layers.append(layer)
        shapes.append(shape)
    head = outside.linears.get("head")
    if head is None:
        # A tied head shares the embedding's memory where its storage is the plain matrix.
        head = backend.linear(outside.weights["head"] if "head" in outside.weights else Piece(embedding), HEAD)
    return Decoder(
        config=replace(config, layers=tuple(shapes)),
        embedding=embedding,
        layers=layers,
        norm=_norm(outside, "norm"),
        head=head,
        backend=backend,
        cache_dtype=cache_dtype,
    )


def _norm(pieces: Pieces, name: str) -> RMSNorm:
    return RMSNorm(pieces.weights[name].weight, pieces.config.norm_eps)


def _layer(pieces: Pieces, backend: Backend, rotary: Rotary) -> tuple[Layer, LayerConfig]:
    assert pieces.layer is not None

    def linear(name: str) -> Linear:
        ready = pieces.linears.get(name)
        return backend.linear(pieces.weights[name], Source(name, pieces.layer)) if ready is None else ready

    entering = _norm(pieces, "mixer_norm")
    qkv, out = linear("qkv"), linear("attention_out")
    norms = [_norm(pieces, name) if name in pieces.weights else None for name in ("query_norm", "key_norm")]
    gate_up, down = linear("gate_up"), linear("down")
    shape = _shape(pieces, qkv, out, gate_up, down)
    attention = Attention(shape, qkv, out, rotary, *norms)
    return Layer(pieces.layer, entering, attention, _norm(pieces, "mlp_norm"), GatedMLP(gate_up, down)), shape


def _shape(pieces: Pieces, qkv: Linear, out: Linear, gate_up: Linear, down: Linear) -> LayerConfig:
    """How many heads and channels the linear layers of a layer make.

    Raises:
        UserError: no whole number of heads, or layers that do not fit each other.
    """
    assert pieces.layer is not None
    given, hidden = pieces.config.layers[pieces.layer], pieces.config.hidden_size
    heads, ffn = out.in_features // given.head_dim, down.in_features
    kv_heads = (qkv.out_features // given.head_dim - heads) // 2
    fits = (
        heads >= kv_heads >= 1
        and heads % kv_heads == 0
        and qkv.out_features == (heads + 2 * kv_heads) * given.head_dim
        and out.in_features == heads * given.head_dim
        and gate_up.out_features == 2 * ffn
        and out.out_features == down.out_features == hidden
    )
    if not fits:
        found = {"qkv": qkv, "attention_out": out, "gate_up": gate_up, "down": down}
        sizes = ", ".join(f"{name} [{each.out_features}, {each.in_features}]" for name, each in found.items())
        raise UserError(
            f"layer {pieces.layer} was transformed to pieces that do not fit heads of {given.head_dim} and "
            f"{hidden} channels: {sizes}"
        )
    return replace(given, heads=heads, kv_heads=kv_heads, ffn=ffn)
