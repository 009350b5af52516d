"""Builds a decoder from its pieces, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from hasten.errors import UserError
from hasten.model.config import LayerConfig, ModelConfig
from hasten.model.decoder import Backend, Decoder
from hasten.model.layers import Attention, GatedMLP, Layer, NoNorm, PairedLayer, RMSNorm, Rotary
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
        UserError: a transform leaves out a piece, or leaves widths that do not fit each other.
    """
    changed = map(lambda each: reduce(lambda given, transform: transform(given), transforms, each), pieces)
    outside = next(changed)
    # Backends read its memory as it lies.
    piece = _weight(outside, "embedding")
    embedding = piece.weight.contiguous()
    # A tied head may stay as it is stored, and shares the embedding's memory where it does not.
    tied = Piece.of(piece.stored, lambda: embedding) if piece.stored else Piece(embedding)
    frequencies = torch.tensor(config.inverse_frequencies, dtype=torch.float32, device=embedding.device)
    if embedding.dtype == torch.float64:
        frequencies = frequencies.double()
    builder = _Builder(backend, Rotary(frequencies, config.rope_factor, config.rope_axes), embedding)
    layers, shapes = [], []
    # By map, as a loop's variable would hold one layer's weights while the next one's are read.
    for layer, shape in map(builder.layer, changed):
        layers.append(layer)
        shapes.append(shape)
    return Decoder(
        config=replace(config, hidden_size=builder.hidden, layers=tuple(shapes)),
        embedding=embedding,
        layers=layers,
        norm=builder.norm(outside, "norm", builder.hidden),
        head=builder.head(outside, tied),
        backend=backend,
        cache_dtype=cache_dtype,
    )


class _Builder:
    """Makes layers from pieces, in the width and dtype of the embedding [vocabulary, hidden]."""

    def __init__(self, backend: Backend, rotary: Rotary, embedding: Tensor) -> None:
        self.backend, self.rotary, self.embedding = backend, rotary, embedding
        self.hidden = embedding.shape[1]

    def norm(self, pieces: Pieces, name: str, width: int) -> RMSNorm:
        """The norm of `width` channels.

        Raises:
            UserError: it has others, or is missing.
        """
        if name in pieces.without:
            return NoNorm(width)
        weight = _weight(pieces, name).weight.to(self.embedding.dtype)
        if weight.shape != (width,):
            raise UserError(f"{_place(pieces)} was transformed to a {name} of {list(weight.shape)}, not [{width}]")
        return RMSNorm(weight, pieces.config.norm_eps)

    def linear(self, pieces: Pieces, name: str) -> Linear:
        """The linear layer, ready or by the backend.

        Raises:
            UserError: it is missing.
        """
        ready = pieces.linears.get(name)
        if ready is not None:
            return ready
        return self.backend.linear(_weight(pieces, name).to(self.embedding.dtype), Source(name, pieces.layer))

    def head(self, outside: Pieces, tied: Piece) -> Linear:
        """The head; `tied` is the embedding's matrix, for where there is no other one.

        Raises:
            UserError: it reads another width.
        """
        if "head" in outside.weights or "head" in outside.linears:
            head = self.linear(outside, "head")
        else:
            head = self.backend.linear(tied, HEAD)
        if head.in_features != self.hidden:
            found = head.in_features
            raise UserError(f"{_place(outside)} was transformed to a head of {found} inputs, not {self.hidden}")
        return head

    def layer(self, pieces: Pieces) -> tuple[Layer, LayerConfig]:
        """A layer, and its shape."""
        assert pieces.layer is not None
        head_dim = pieces.config.layers[pieces.layer].slots.key_width
        entering = self.norm(pieces, "mixer_norm", self.hidden)
        qkv, out = self.linear(pieces, "qkv"), self.linear(pieces, "attention_out")
        norms = [
            self.norm(pieces, name, head_dim) if name in pieces.weights else None for name in ("query_norm", "key_norm")
        ]
        gate_up, down = self.linear(pieces, "gate_up"), self.linear(pieces, "down")
        shape = self._shape(pieces, qkv, out, gate_up, down)
        attention, mlp = Attention(shape, qkv, out, self.rotary, *norms), GatedMLP(gate_up, down)
        leaving = self.norm(pieces, "mlp_norm", self.hidden)
        if "token_norm" not in pieces.weights:
            return Layer(pieces.layer, entering, attention, leaving, mlp), shape
        token_norm = self.norm(pieces, "token_norm", self.hidden)
        return PairedLayer(pieces.layer, token_norm, entering, attention, leaving, mlp), shape

    def _shape(self, pieces: Pieces, qkv: Linear, out: Linear, gate_up: Linear, down: Linear) -> LayerConfig:
        """How many heads and channels the linear layers of a layer make.

        Raises:
            UserError: no whole number of heads, or layers that do not fit each other.
        """
        assert pieces.layer is not None
        given = pieces.config.layers[pieces.layer]
        width = given.slots.key_width
        heads, ffn = out.in_features // width, down.in_features
        kv_heads = (qkv.out_features // width - heads) // 2
        read = 2 * self.hidden if "token_norm" in pieces.weights else self.hidden
        fits = (
            heads >= kv_heads >= 1
            and heads % kv_heads == 0
            and qkv.out_features == (heads + 2 * kv_heads) * width
            and out.in_features == heads * width
            and gate_up.out_features == 2 * ffn
            and qkv.in_features == read
            and gate_up.in_features == out.out_features == down.out_features == self.hidden
        )
        if not fits:
            found = {"qkv": qkv, "attention_out": out, "gate_up": gate_up, "down": down}
            sizes = ", ".join(f"{name} [{each.out_features}, {each.in_features}]" for name, each in found.items())
            raise UserError(
                f"{_place(pieces)} was transformed to pieces that do not fit heads of {width} and "
                f"{self.hidden} channels: {sizes}"
            )
        return LayerConfig.attention(heads, kv_heads, width, ffn, given.window)


def _weight(pieces: Pieces, name: str) -> Piece:
    """A weight that must be there.

    Raises:
        UserError: a transform left it out.
    """
    if name not in pieces.weights:
        raise UserError(f"{_place(pieces)} was transformed to pieces without {name}, which must be there")
    return pieces.weights[name]


def _place(pieces: Pieces) -> str:
    return "what stands outside the layers" if pieces.layer is None else f"layer {pieces.layer}"
