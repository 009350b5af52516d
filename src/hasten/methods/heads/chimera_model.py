"""Chimera's networks: what makes states of trigrams, and words of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.methods.heads.chimera_weights import TRIGRAM, ChimeraWeights
from hasten.methods.heads.head import backend_of, layer_of, linear_of, logits_of
from hasten.model import Decoder, LayerConfig
from hasten.model.assembly import assemble
from hasten.model.linear import Linear
from hasten.model.weights import Piece, Pieces


class ChimeraModel:
    """Both encoders and the heads, in the target's storage.

    Attributes:
        levels: heads.
        words: int64, the tokens of a row of logits; None where it is the vocabulary.
        encoder: the layer, as a decoder whose rows enter as embeddings; its head is what says words.
        own_bytes: of the weights.
    """

    def __init__(self, target: Decoder, weights: ChimeraWeights) -> None:
        linear = partial(linear_of, target)
        self.embedding, self.levels = target.embedding, len(weights.heads)
        self.words = None if weights.words is None else weights.words.to(target.device)
        self.narrow = None if weights.narrow is None else linear(weights.narrow)
        self.mix, self.out = linear(weights.mix), linear(weights.out)
        self.heads = [linear(head) for head in weights.heads]
        self.complete = self.heads[0].in_features == 2 * target.config.hidden_size
        said = target.head if weights.said is None else linear(weights.said)
        self.encoder = _encoder(target, weights, said)
        own = [self.mix, self.out, *self.heads, *([self.narrow] if self.narrow else [])]
        own += [] if said is target.head else [said]
        self.own_bytes = sum(each.nbytes() for each in own) + self.encoder.layers[0].nbytes()

    def grams(self, trigrams: Sequence[Sequence[int]]) -> Tensor:
        """g [rows, hidden] of rows of three tokens."""
        # What was given as an embedding has no token: some word stands there.
        ids = torch.tensor(trigrams, device=self.embedding.device).clamp(min=0)
        parts = F.embedding(ids.flatten(), self.embedding)
        if self.narrow is not None:
            parts = self.narrow.forward(parts)
        side = parts.reshape(len(ids), -1)
        return self.out.forward(side + F.silu(self.mix.forward(side))).to(self.embedding.dtype)

    def logits(self, level: int, states: Tensor, estimates: Tensor) -> Tensor:
        """[rows, words] of one head.

        Args:
            states: [rows, hidden], the last that the target computed.
            estimates: [rows, hidden], at the token that stands so many levels behind the root.
        """
        if self.complete:
            return logits_of(self.heads[level], torch.cat([states, estimates], -1))
        return logits_of(self.encoder.head, estimates + self.heads[level].forward(states))


def _encoder(target: Decoder, weights: ChimeraWeights, head: Linear) -> Decoder:
    """A decoder of the one layer."""
    width, layer = target.config.layers[0].slots.key_width, weights.layer
    shape = LayerConfig.attention(
        layer.queries.shape[0] // width, layer.keys.shape[0] // width, width, layer.gate.shape[0]
    )
    config = replace(target.config, layers=(shape,))
    # What heads read is the layer's output itself.
    outside = Pieces(config, None, {"embedding": Piece(target.embedding)}, {"head": head}, frozenset({"norm"}))
    own = layer_of(target, config, layer.pieces)
    return assemble(config, (outside, own), backend_of(target), target.cache_dtype)


def trigram(tokens: Sequence[int]) -> list[int]:
    """The last three of two or more tokens: the second of a text counts twice."""
    last = list(tokens[-TRIGRAM:])
    return last if len(last) == TRIGRAM else [*last, last[-1]]
