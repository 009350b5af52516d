"""EAGLE heads of random weights, for any target."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.methods.heads.eagle_format import EagleWeights, default_taps
from hasten.methods.heads.pieces import rounded, with_bias
from hasten.model.config import ModelConfig
from hasten.model.weights import Piece


def random_head(
    target: ModelConfig,
    version: int,
    words: Tensor | None = None,
    *,
    own: bool = False,
    normed: bool = False,
    store: str = "",
) -> EagleWeights:
    """A head whose layer has the target's shape.

    Args:
        own: with output matrix and embedding that are not the target's.
        store: what matrices are rounded to; by default they stay float32.
    """
    draw, hidden, shape = torch.Generator().manual_seed(version), target.hidden_size, target.layers[0]
    width, read = shape.slots.key_width, hidden * (2 if version == 3 else 1)
    taps = default_taps(len(target.layers)) if version == 3 else ()

    def drawn(*size: int) -> Tensor:
        return size[-1] ** -0.5 * torch.randn(size, generator=draw) + (len(size) == 1)

    def stored(weight: Tensor) -> Piece:
        return rounded(weight, store) if store and weight.ndim == 2 else Piece(weight)

    layer = {
        "query": drawn(shape.heads * width, read),
        "key": drawn(shape.slots.heads * width, read),
        "value": drawn(shape.slots.heads * width, read),
        "attention_out": drawn(hidden, shape.heads * width),
        "gate": drawn(shape.ffn, hidden),
        "up": drawn(shape.ffn, hidden),
        "down": drawn(hidden, shape.ffn),
        "mlp_norm": drawn(hidden),
    }
    if version == 3:
        layer |= {"token_norm": drawn(hidden), "mixer_norm": drawn(hidden)}
    said = target.vocab_size if words is None else len(words)
    fusion = with_bias(stored(drawn(hidden, hidden * (len(taps) or 2))), drawn(hidden) - 1 if version == 1 else None)
    return EagleWeights(
        version, target, fusion, {name: stored(weight) for name, weight in layer.items()},
        Piece(drawn(hidden)) if version == 3 else None, stored(3 * drawn(said, hidden)) if own else None, words,
        Piece(drawn(target.vocab_size, hidden)) if own else None, taps, normed,
    )  # fmt: skip
