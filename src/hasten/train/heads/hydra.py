"""Hydra: heads that see the tokens before the one that they say, trained on those that came (2402.05109, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.errors import UserError
from hasten.methods.heads.hydra_weights import HydraHead, HydraWeights
from hasten.methods.heads.pieces import rounded
from hasten.model import Decoder
from hasten.model.config import Slots
from hasten.train.heads.prefix import PrefixLayer
from hasten.train.heads.recipe import Dialogues, HeadBatch
from hasten.train.heads.speakers import SpeakerRecipe, Speakers, silent


class HydraBlocks(nn.Module):
    """What stands in front of a head's output: a first block that takes in all, and one that is run `layers - 1` times.

    The authors' first residual begins at random; this one as the state alone, so that a head begins as the target's.
    """

    def __init__(self, hidden: int, parts: int, layers: int) -> None:
        super().__init__()
        self.mix, self.carry = silent(parts * hidden, hidden), silent(parts * hidden, hidden)
        nn.init.eye_(self.carry.weight)
        self.block = silent(hidden, hidden) if layers > 1 else None
        self.layers = layers

    def forward(self, z: Tensor) -> Tensor:
        """[rows, hidden] from [rows, parts * hidden]."""
        x: Tensor = self.carry(z) + F.silu(self.mix(z))
        if self.block is not None:
            for _ in range(self.layers - 1):
                x = x + F.silu(self.block(x))
        return x

    def exported(self, store: str) -> HydraHead:
        """As it is stored."""
        mix, carry, block = (
            None if each is None else rounded(each.weight, store, each.bias)
            for each in (self.mix, self.carry, self.block)
        )
        assert mix is not None and carry is not None
        return HydraHead(mix, carry, block)


class HydraNetwork(Speakers):
    """Heads that know the row and the tokens behind it.

    Args:
        layers: blocks of each.
        prefix: whether they read what a layer of their own makes of the target's states.
    """

    embedding: Tensor

    def __init__(
        self, target: Decoder, words: Tensor | None, heads: int, layers: int, shared: bool, prefix: bool
    ) -> None:
        super().__init__(target, words, heads, shared, bias=True)
        self.prefix = PrefixLayer(target) if prefix else None
        self.register_buffer("embedding", target.embedding.float(), persistent=False)
        self.blocks = [HydraBlocks(target.config.hidden_size, k + 2, layers) for k in range(heads)]
        self.block_modules = nn.ModuleList(self.blocks)

    def context(self, batch: HeadBatch) -> Tensor:
        return super().context(batch) if self.prefix is None else self.prefix(batch)

    def hidden(self, k: int, context: Tensor, batch: HeadBatch, rows: Tensor) -> Tensor:
        seen = [F.embedding(batch.ids[rows + j], self.embedding) for j in range(1, k + 2)]
        hidden: Tensor = self.blocks[k](torch.cat([context[rows], *seen], -1))
        return hidden


@dataclass(frozen=True)
class HydraRecipe(SpeakerRecipe[HydraNetwork]):
    """See `SpeakerRecipe`. All heads weigh the same, as the authors have it.

    Attributes:
        prefix: whether heads have a prefix layer (Hydra++). Its dropout is left out: an epoch or two need none.
    """

    decay: float = 1.0
    prefix: bool = False

    def build(self, target: Decoder, dialogues: Dialogues) -> HydraNetwork:
        words = dialogues.words(self.words, target.config.vocab_size)
        if self.prefix and not isinstance(target.config.layers[0].keeps, Slots):
            raise UserError("a prefix layer is shaped as the target's layers, and these have no keys and values")
        return HydraNetwork(target, words, self.heads, self.layers, self.shared_head, self.prefix)

    def export(self, model: HydraNetwork, folder: Path) -> None:
        weights = HydraWeights(
            [blocks.exported(self.store) for blocks in model.blocks],
            model.exported(self.store),
            self.layers,
            model.words,
            self.measured(model),
            {} if model.prefix is None else model.prefix.exported(self.store),
        )
        weights.save(folder, self.told(model))
