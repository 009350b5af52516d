"""Medusa-1: heads on a frozen target's final states, trained on its own answers (2401.10774, section 2.2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.errors import UserError
from hasten.methods.heads.medusa import MedusaWeights
from hasten.model import Decoder
from hasten.train.heads.recipe import Dialogues, HeadBatch, HeadRecipe

RANKS = 10
"""Of each head, whose accuracy is measured."""


class MedusaHead(nn.Module):
    """Residual blocks, and a matrix [words, hidden] that begins as the target's."""

    def __init__(self, layers: int, weight: Tensor) -> None:
        super().__init__()
        hidden = weight.shape[1]
        self.linears = [nn.Linear(hidden, hidden) for _ in range(layers)]
        self.blocks, self.weight = nn.ModuleList(self.linears), nn.Parameter(weight.clone())
        for linear in self.linears:
            # Weights of zero, as the paper begins; the bias too, so that a head begins as the target's own.
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Logits [rows, words] from states [rows, hidden]."""
        for linear in self.linears:
            states = states + F.silu(linear(states))
        return states @ self.weight.T


class MedusaNetwork(nn.Module):
    """All heads.

    Args:
        weight: [words, hidden], of the target's head.
        words: int64 [words], or None where they are the whole vocabulary.
    """

    def __init__(self, heads: int, layers: int, weight: Tensor, words: Tensor | None, vocabulary: int) -> None:
        super().__init__()
        self.each = [MedusaHead(layers, weight) for _ in range(heads)]
        self.heads, self.words = nn.ModuleList(self.each), words
        self.row_of = torch.full((vocabulary,), -1)
        self.row_of[torch.arange(vocabulary) if words is None else words] = torch.arange(len(weight))

    def rows(self, batch: HeadBatch, k: int) -> tuple[Tensor, Tensor]:
        """Where head k drafts, and the row of its matrix that would be right there; -1 where it has none."""
        rows = batch.ahead(k + 2)
        return rows, self.row_of[batch.ids[rows + k + 2]]


@dataclass(frozen=True)
class MedusaRecipe(HeadRecipe[MedusaNetwork]):
    """Attributes beside those of all heads:

    heads, layers: how many heads, and residual blocks of each.
    decay: the weight of each head's loss over that of the one before.
    """

    heads: int = 4
    layers: int = 1
    decay: float = 0.8

    states: ClassVar[str] = "final_norm.bin"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (1 <= self.heads <= 16 and 1 <= self.layers <= 8):
            raise UserError("medusa: heads must be between 1 and 16, layers between 1 and 8")

    def build(self, target: Decoder, dialogues: Dialogues) -> MedusaNetwork:
        vocabulary = target.config.vocab_size
        words = dialogues.words(self.words, vocabulary)
        head = target.head.dequant().float()
        return MedusaNetwork(self.heads, self.layers, head if words is None else head[words], words, vocabulary)

    def loss(self, model: MedusaNetwork, batch: HeadBatch, progress: float, generator: torch.Generator) -> Tensor:
        """Cross-entropy of each head on the target's own tokens, among those that the head can say."""
        total = torch.zeros(())
        for k in range(self.heads):
            rows, right = model.rows(batch, k)
            rows, right = rows[right >= 0], right[right >= 0]
            if len(rows):
                total = total + self.decay**k * F.cross_entropy(model.each[k](batch.states[rows, 0]), right)
        return total

    @torch.inference_mode()
    def accuracy(self, model: MedusaNetwork, dialogues: Dialogues) -> list[list[float]]:
        """Of each head, how often each rank was right on the dialogues that were held out."""
        hits, seen = torch.zeros(self.heads, RANKS), torch.zeros(self.heads, 1)
        for batch in dialogues.batches(dialogues.held_out, self.batch_tokens):
            for k in range(self.heads):
                rows, right = model.rows(batch, k)
                best = model.each[k](batch.states[rows, 0]).topk(min(RANKS, len(model.each[k].weight)), -1).indices
                hits[k, : best.shape[1]] += (best == right.unsqueeze(1)).sum(0)
                seen[k] += len(rows)
        shares: list[list[float]] = (hits / seen.clamp(min=1)).tolist()
        return [[round(share, 4) for share in ranks] for ranks in shares]

    def export(self, model: MedusaNetwork, folder: Path) -> None:
        table = self.accuracy(model, Dialogues(Path(self.data), self.states))
        weights = MedusaWeights(
            [[(_stored(each.weight), _stored(each.bias)) for each in head.linears] for head in model.each],
            [_stored(head.weight) for head in model.each],
            model.words,
            tuple(tuple(ranks) for ranks in table),
        )
        words, hidden = model.each[0].weight.shape
        weights.save(
            folder,
            {
                "hidden_size": hidden,
                "vocab_size": len(model.row_of),
                "truncated_vocab_size": words,
                "target": Path(self.parent).name,
            },
        )


def _stored(parameter: Tensor) -> Tensor:
    return parameter.detach().bfloat16()
