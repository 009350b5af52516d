"""The network of an EAGLE head: what its layer reads, and what of the target it shares."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.methods.heads.eagle_format import EagleWeights
from hasten.methods.heads.head import backend_of, layer_of, linear_of
from hasten.methods.heads.pieces import stacked
from hasten.model import Decoder
from hasten.model.assembly import assemble
from hasten.model.layers import NoNorm, RMSNorm
from hasten.model.linear import Linear
from hasten.model.native.backend import runs
from hasten.model.native.drafting import Growth
from hasten.model.native.linear import Panels
from hasten.model.weights import Piece, Pieces


class EagleNetwork:
    """A trained head in the target's own storage.

    Attributes:
        decoder: its layer, its norm and its head, over the target's embedding.
        own_bytes: of weights that are not the target's.
    """

    def __init__(self, target: Decoder, weights: EagleWeights) -> None:
        self.weights, on = weights, (target.dtype, target.device)
        layer = {name: piece for name, piece in weights.layer.items() if name not in ("query", "key", "value")}
        layer |= {"qkv": stacked([weights.layer[name] for name in ("query", "key", "value")])}
        layer |= {"gate_up": stacked([layer.pop("gate"), layer.pop("up")])}
        # Where the residual stream begins with the normed state, rows enter so, and are not normed again.
        self._entrance: RMSNorm = NoNorm(weights.config.hidden_size)
        bare = {"mixer_norm"} if weights.version == 1 else set()
        if weights.normed_residual and weights.version == 3:
            norm = layer.pop("mixer_norm").to(*on).weight
            self._entrance, bare = RMSNorm(norm, weights.config.norm_eps), {"mixer_norm"}
        outside = {"embedding": Piece(target.embedding) if weights.embedding is None else weights.embedding.to(*on)}
        if weights.norm is not None:
            outside["norm"] = weights.norm.to(*on)
        pieces = (
            Pieces(weights.config, None, outside, {"head": self._head(target)}, frozenset({"norm"} - {*outside})),
            layer_of(target, weights.config, layer, frozenset(bare)),
        )
        self.decoder = assemble(weights.config, pieces, backend_of(target), target.cache_dtype)
        self.fusion = linear_of(target, weights.fusion)
        self.words = None if weights.words is None else weights.words.to(target.device)
        own = 0 if self.decoder.head is target.head else self.decoder.head.nbytes()
        own += 0 if weights.embedding is None else self.decoder.embedding.nbytes
        self.own_bytes = own + self.decoder.layers[0].nbytes() + self.fusion.nbytes()

    def _head(self, target: Decoder) -> Linear:
        """Its own, or the target's, or some rows of that."""
        weights = self.weights
        if weights.head is None and weights.words is None:
            return target.head
        return linear_of(target, Piece(target.head.dequant()[weights.words]) if weights.head is None else weights.head)

    def enter(self, states: Tensor, tokens: Tensor) -> Tensor:
        """What rows of the target's states, and the tokens behind them, enter the layer as: [rows, hidden]."""
        return (
            self.fuse(states, tokens)
            if self.weights.version == 1
            else self._entrance.forward(self.fusion.forward(states))
        )

    def enter_again(self, outputs: Tensor, tokens: Tensor) -> Tensor:
        """The same of its own outputs, [rows, hidden]."""
        return self.fuse(outputs, tokens) if self.weights.version == 1 else self._entrance.forward(outputs)

    def fuse(self, states: Tensor, tokens: Tensor) -> Tensor:
        """EAGLE-1: a token's embedding and a final state, in one."""
        return self.fusion.forward(torch.cat([self.decoder.embedding[tokens], states], -1))

    def growth(self, width: int, least: float) -> Growth | None:
        """How trees grow in one native call; None where the network is composed in PyTorch.

        Args:
            width, least: as of `Growth`.
        """
        if not runs(self.decoder):
            return None
        assert isinstance(self.fusion, Panels)
        fusion = self.fusion if self.weights.version == 1 else None
        entrance = None if type(self._entrance) is NoNorm else self._entrance.weight.float()
        return Growth(fusion, entrance, self.words, width, width, least)
