"""A decoder as `step.cpp` reads it, where it is made of nothing but pieces that the native step knows."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.model.layers import Attention, GatedMLP, Layer, NoNorm, PairedLayer, RMSNorm
from hasten.model.linear import StackedLinear
from hasten.model.native.blocks import BlockLinear
from hasten.model.native.linear import FORMATS, LANES, Format, PanelLinear
from hasten.model.native.structs import LayerStruct, LinearStruct, ModelStruct

if TYPE_CHECKING:
    from hasten.model.decoder import Decoder
    from hasten.model.linear import Linear


def format_of(dtype: torch.dtype) -> Format:
    """As which what is not in blocks is stored, of a model in that dtype."""
    return "float32" if dtype == torch.float32 else "bfloat16"


def _struct(linear: Linear) -> LinearStruct | None:
    """What `step.cpp` reads of a linear layer, if it knows it. Exactly these: a subclass computes something else."""
    if type(linear) is PanelLinear or type(linear) is BlockLinear:
        return linear.struct
    return None


def description(model: Decoder) -> ModelStruct | None:
    """See `NativeBackend.describe`; the structure keeps alive what it points to."""
    config, shape = model.config, model.config.layers[0]
    kept: list[Any] = []

    def pointer(values: Tensor | None) -> int | None:
        if values is None:
            return None
        kept.append(values.detach().float().contiguous())
        return int(kept[-1].data_ptr())

    def weight(norm: RMSNorm | None) -> int | None:
        return None if norm is None or type(norm) is NoNorm else pointer(norm.weight)

    slots = shape.slots
    hidden, width = config.hidden_size, shape.heads * slots.key_width
    valued = slots.heads * slots.key_width
    head = _struct(model.head)
    if head is None or type(model.norm) not in (RMSNorm, NoNorm) or shape.ffn % LANES:
        return None
    if model.dtype not in (torch.float32, torch.bfloat16):
        return None
    layers = (LayerStruct * len(model.layers))()
    for index, layer in enumerate(model.layers):
        attention, mlp = layer.mixer, layer.mlp
        # Exactly these: a subclass computes something else. And of the sizes of the first: pruned ones may differ.
        if type(layer) not in (Layer, PairedLayer) or type(attention) is not Attention or type(mlp) is not GatedMLP:
            return None
        read = 2 * hidden if isinstance(layer, PairedLayer) else hidden
        matrices: dict[str, tuple[Linear, tuple[int, int]]] = {
            "qkv": (attention.qkv, (width + 2 * valued, read)),
            "out": (attention.out, (hidden, width)),
            "gate_up": (mlp.gate_up, (2 * shape.ffn, hidden)),
            "down": (mlp.down, (hidden, shape.ffn)),
        }
        if type(attention.qkv) is StackedLinear and len(attention.qkv.parts) == 2:
            above, values = attention.qkv.parts
            matrices |= {"qkv": (above, (width + valued, read)), "values": (values, (valued, read))}
        structs = {
            name: struct
            for name, (piece, size) in matrices.items()
            if (struct := _struct(piece)) is not None and (piece.out_features, piece.in_features) == size
        }
        token_norm = layer.token_norm if isinstance(layer, PairedLayer) else None
        norms = layer.mixer_norm, layer.mlp_norm, attention.query_norm, attention.key_norm, token_norm
        if len(structs) < len(matrices) or any(type(norm) not in (RMSNorm, NoNorm, type(None)) for norm in norms):
            return None
        layers[index] = LayerStruct(
            attention_norm=weight(layer.mixer_norm),
            query_norm=weight(attention.query_norm),
            key_norm=weight(attention.key_norm),
            mlp_norm=weight(layer.mlp_norm),
            token_norm=weight(token_norm),
            window=config.layers[layer.index].window or 0,
            **structs,
        )
    axes = torch.tensor(config.rope_axes) if config.rope_axes else None
    kept += [layers, axes]
    described = ModelStruct(
        layers=len(layers),
        hidden=hidden,
        heads=shape.heads,
        kv_heads=slots.heads,
        head_dim=slots.key_width,
        ffn=shape.ffn,
        vocabulary=model.embedding.shape[0],
        norm_eps=config.norm_eps,
        rope_factor=config.rope_factor,
        inverse_frequencies=pointer(torch.tensor(config.inverse_frequencies)),
        axis_of=None if axes is None else axes.data_ptr(),
        embedding=model.embedding.data_ptr(),
        embedding_format=FORMATS.index(format_of(model.dtype)),
        final_norm=weight(model.norm),
        head=head,
        layer=ctypes.addressof(layers),
    )
    described.kept, described.numbers = kept, tuple(layer.index for layer in model.layers)
    return described
