"""Hydra++'s prefix layer: a whole Llama layer with its norms over the target's states, and the attention that is in it.

2402.05109, section 4.3. Heads then read what this layer makes of a state that knows the states before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hasten.errors import UserError
from hasten.methods.heads.files import require_names, require_shape
from hasten.methods.heads.head import backend_of, layer_of
from hasten.methods.heads.pieces import stacked
from hasten.model import Decoder, LayerConfig
from hasten.model.assembly import assemble
from hasten.model.weights import Piece, Pieces

LAYER = "layers.0."
NAMES = {
    "mixer_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Of a layer's pieces, a Llama's names of what stands in them, one below the other."""
NORM = "norm.weight"


def prefix_network(target: Decoder, prefix: Mapping[str, Piece], folder: Path) -> Decoder:
    """The layer as a network whose rows are embeddings: the target's states, at its positions.

    Args:
        prefix: tensors by a Llama's names.
        folder: where they are from.

    Raises:
        UserError: tensors are missing, too many, or of another target.
    """
    hidden, width = target.config.hidden_size, target.config.layers[0].slots.key_width
    require_names(folder, prefix, {NORM, *(name for names in NAMES.values() for name in map(_weight, names))})
    require_shape(folder, NORM, prefix[NORM], hidden)
    pieces = {}
    for piece, names in NAMES.items():
        parts = [prefix[_weight(name)] for name in names]
        pieces[piece] = parts[0] if len(parts) == 1 else stacked(parts)
    queries, keys = (prefix[_weight(name)].shape[0] for name in NAMES["qkv"][:2])
    if queries % width or keys % width or not keys or queries % keys:
        raise UserError(f"{folder}: queries of {queries} and keys of {keys} channels are no heads of {width}")
    shape = LayerConfig.attention(queries // width, keys // width, width, pieces["down"].shape[1])
    config = replace(target.config, layers=(shape,), rope_axes=(), diffusion=None)
    outside = {"embedding": Piece(target.embedding), "norm": prefix[NORM].to(target.dtype, target.device)}
    return assemble(
        config,
        [Pieces(config, None, outside, {"head": target.head}), layer_of(target, config, pieces)],
        backend_of(target),
        target.cache_dtype,
    )


def _weight(name: str) -> str:
    return f"{LAYER}{name}.weight"
