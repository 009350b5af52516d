"""Hydra++'s prefix layer as it is trained: a Llama layer that reads the states of whole dialogues."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.methods.heads.pieces import rounded
from hasten.methods.heads.prefix import LAYER, NAMES, NORM
from hasten.model import Decoder
from hasten.model.layers import Rotary
from hasten.model.weights import Piece
from hasten.train.heads.recipe import HeadBatch


class PrefixLayer(nn.Module):
    """Norm and attention, norm and gated MLP, each with its residual, and a last norm; shaped as the target's layers.

    It begins as one that changes nothing but lengths: what it adds to a row is zero, and the last norm has the mean
    length of the target's.
    """

    def __init__(self, target: Decoder) -> None:
        super().__init__()
        config, shape = target.config, target.config.layers[0]
        hidden, self.width, self.heads, self.kv_heads = (
            config.hidden_size, shape.slots.key_width, shape.heads, shape.slots.heads
        )  # fmt: skip
        self.eps = config.norm_eps
        self.rotary = Rotary(torch.tensor(config.inverse_frequencies), config.rope_factor)

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        self.query, self.out = linear(hidden, self.heads * self.width), linear(self.heads * self.width, hidden)
        self.key, self.value = (linear(hidden, self.kv_heads * self.width) for _ in range(2))
        self.gate, self.up, self.down = linear(hidden, shape.ffn), linear(hidden, shape.ffn), linear(shape.ffn, hidden)
        self.entering, self.between = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.ones(hidden))
        self.norm = nn.Parameter(torch.full((hidden,), target.norm.weight.float().square().mean().sqrt().item()))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, batch: HeadBatch) -> Tensor:
        """[rows, hidden] of a batch of whole dialogues."""
        x = batch.states[:, 0]
        lengths = torch.bincount(batch.dialogue).tolist()
        positions = torch.cat([torch.arange(length) for length in lengths])
        x = x + self.out(self._attended(self._normed(x, self.entering), positions, lengths))
        normed = self._normed(x, self.between)
        x = x + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return self._normed(x, self.norm)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def _attended(self, x: Tensor, positions: Tensor, lengths: list[int]) -> Tensor:
        """[rows, heads * width]: each row sees those before it in its dialogue."""
        query, key, value = (
            torch.unflatten(linear(x), 1, (-1, self.width)) for linear in (self.query, self.key, self.value)
        )
        angles = self.rotary.angles(positions, query.dtype)
        turned = self.rotary.rotate(query, angles), self.rotary.rotate(key, angles), value
        parts = zip(*(torch.split(each.transpose(0, 1)[None], lengths, 2) for each in turned), strict=True)
        seen = [
            F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
            for queries, keys, values in parts
        ]
        return torch.cat(seen).flatten(1)

    def exported(self, store: str) -> dict[str, Piece]:
        """As it is stored, by a Llama's names."""
        linears = {
            "qkv": (self.query, self.key, self.value),
            "attention_out": (self.out,),
            "gate_up": (self.gate, self.up),
            "down": (self.down,),
        }
        matrices = {
            f"{LAYER}{name}.weight": rounded(linear.weight, store)
            for piece, own in linears.items()
            for name, linear in zip(NAMES[piece], own, strict=True)
        }
        norms = {"mixer_norm": self.entering, "mlp_norm": self.between}
        vectors = {f"{LAYER}{NAMES[piece][0]}.weight": norm for piece, norm in norms.items()} | {NORM: self.norm}
        return matrices | {name: Piece(vector.detach().bfloat16()) for name, vector in vectors.items()}
