"""Medusa-1: heads on a frozen target's final states, trained on its own answers (2401.10774, section 2.2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from hasten.methods.heads.medusa import MedusaWeights
from hasten.methods.heads.pieces import rounded
from hasten.model import Decoder
from hasten.train.heads.recipe import Dialogues, HeadBatch
from hasten.train.heads.speakers import SpeakerRecipe, Speakers, silent


class MedusaNetwork(Speakers):
    """Heads that know the row alone.

    Args:
        layers: residual blocks of each.
    """

    def __init__(self, target: Decoder, words: Tensor | None, heads: int, layers: int, shared: bool) -> None:
        super().__init__(target, words, heads, shared, bias=False)
        hidden = target.config.hidden_size
        self.blocks = [[silent(hidden, hidden) for _ in range(layers)] for _ in range(heads)]
        self.block_modules = nn.ModuleList(nn.ModuleList(layers) for layers in self.blocks)

    def hidden(self, k: int, context: Tensor, batch: HeadBatch, rows: Tensor) -> Tensor:
        x = context[rows]
        for block in self.blocks[k]:
            x = x + F.silu(block(x))
        return x

    def weights(self, store: str, accuracy: tuple[tuple[float, ...], ...]) -> MedusaWeights:
        """As they are stored."""
        blocks = [[rounded(block.weight, store, block.bias) for block in layers] for layers in self.blocks]
        return MedusaWeights(blocks, self.exported(store), self.words, accuracy)


@dataclass(frozen=True)
class MedusaRecipe(SpeakerRecipe[MedusaNetwork]):
    """See `SpeakerRecipe`."""

    def build(self, target: Decoder, dialogues: Dialogues) -> MedusaNetwork:
        words = dialogues.words(self.words, target.config.vocab_size)
        return MedusaNetwork(target, words, self.heads, self.layers, self.shared_head)

    def export(self, model: MedusaNetwork, folder: Path) -> None:
        model.weights(self.store, self.measured(model)).save(folder, self.told(model))
