"""What Medusa's and Hydra's heads have in common: each says one token from one row, one further ahead than the last."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.errors import UserError
from hasten.methods.heads.pieces import require_store, rounded
from hasten.model import Decoder
from hasten.model.weights import Piece
from hasten.train.heads.recipe import Dialogues, HeadBatch, HeadRecipe

RANKS = 10
"""Of each head, whose accuracy is measured."""


class Speakers(nn.Module):
    """Heads, of which head k says token k + 2 behind a row. Subclasses say what its output matrix is multiplied with.

    Args:
        target: the network; what is taken of it stays as it is.
        words: int64 [words] that heads may say, or None where they are the whole vocabulary.
        heads: how many.
        shared: whether one output matrix serves all.
        bias: whether outputs have one.
    """

    teacher: Tensor

    def __init__(self, target: Decoder, words: Tensor | None, heads: int, shared: bool, bias: bool) -> None:
        super().__init__()
        head, vocabulary = target.head.dequant().float(), target.config.vocab_size
        weight = head if words is None else head[words]
        self.count, self.words = heads, words
        # It is not part of a checkpoint: a run that begins has it.
        self.register_buffer("teacher", weight.clone(), persistent=False)
        self.outputs = [_output(weight, bias) for _ in range(1 if shared else heads)]
        self.output_modules = nn.ModuleList(self.outputs)
        self.row_of = torch.full((vocabulary,), -1)
        self.row_of[torch.arange(vocabulary) if words is None else words] = torch.arange(len(weight))

    def context(self, batch: HeadBatch) -> Tensor:
        """[rows, hidden] of a batch, of which heads read one row: the target's own states."""
        return batch.states[:, 0]

    @abstractmethod
    def hidden(self, k: int, context: Tensor, batch: HeadBatch, rows: Tensor) -> Tensor:
        """[rows, hidden] of head k that drafts from these rows."""

    def logits(self, k: int, context: Tensor, batch: HeadBatch, rows: Tensor) -> Tensor:
        """[rows, words] of head k that drafts from these rows."""
        logits: Tensor = self.outputs[min(k, len(self.outputs) - 1)](self.hidden(k, context, batch, rows))
        return logits

    def rows(self, batch: HeadBatch, k: int) -> tuple[Tensor, Tensor]:
        """Where head k drafts, and the row of its matrix that would be right there; -1 where it has none."""
        rows = batch.ahead(k + 2)
        return rows, self.row_of[batch.ids[rows + k + 2]]

    def exported(self, store: str) -> list[Piece]:
        """Output matrices as they are stored."""
        return [rounded(each.weight, store, each.bias) for each in self.outputs]


def _output(weight: Tensor, bias: bool) -> nn.Linear:
    """A head's own matrix, which begins as the target's."""
    linear = nn.Linear(weight.shape[1], len(weight), bias)
    with torch.no_grad():
        linear.weight.copy_(weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def silent(inputs: int, outputs: int) -> nn.Linear:
    """A layer of zeros, as the papers begin; the bias too, so that a head begins as the target's own."""
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


Spoken = TypeVar("Spoken", bound=Speakers)


@dataclass(frozen=True)
class SpeakerRecipe(HeadRecipe[Spoken]):
    """Attributes beside those of all heads:

    heads, layers: how many heads, and residual blocks of each.
    decay: the weight of each head's loss over that of the one before.
    labels: whether heads learn the tokens that the target said, and not its distribution over their words.
    shared_head: whether one output matrix serves all heads.
    store: what matrices are rounded to in the end: `bf16` (they are not), `q8_0`, `q4_1`.
    """

    heads: int = 4
    layers: int = 1
    decay: float = 0.8
    labels: bool = False
    shared_head: bool = True
    store: str = "q8_0"

    states: ClassVar[str] = "final_norm.bin"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (1 <= self.heads <= 16 and 1 <= self.layers <= 8):
            raise UserError("heads must be between 1 and 16, layers between 1 and 8")
        require_store(self.store)

    def loss(self, model: Spoken, batch: HeadBatch, progress: float, generator: torch.Generator) -> Tensor:
        """Cross-entropy of each head, where the target's own token is one that it can say (2402.05109, section 4.1)."""
        with torch.autocast("cpu", torch.bfloat16):
            context, taught = model.context(batch), None if self.labels else _Taught(model, batch)
            total = torch.zeros(())
            for k in range(self.heads):
                rows, right = model.rows(batch, k)
                rows, right = rows[right >= 0], right[right >= 0]
                if len(rows):
                    said = model.logits(k, context, batch, rows).float()
                    wanted = right if taught is None else taught.at(rows + k + 1)
                    total = total + self.decay**k * F.cross_entropy(said, wanted)
        return total

    @torch.inference_mode()
    def accuracy(self, model: Spoken, dialogues: Dialogues) -> list[list[float]]:
        """Of each head, how often each rank was right on the dialogues that were held out, behind right tokens."""
        hits, seen = torch.zeros(self.heads, RANKS), torch.zeros(self.heads, 1)
        for batch in dialogues.batches(dialogues.held_out, self.batch_tokens):
            context = model.context(batch)
            for k in range(self.heads):
                rows, right = model.rows(batch, k)
                best = model.logits(k, context, batch, rows).topk(min(RANKS, len(model.teacher)), -1).indices
                hits[k, : best.shape[1]] += (best == right.unsqueeze(1)).sum(0)
                seen[k] += len(rows)
        shares: list[list[float]] = (hits / seen.clamp(min=1)).tolist()
        return [[round(share, 4) for share in ranks] for ranks in shares]

    def measured(self, model: Spoken) -> tuple[tuple[float, ...], ...]:
        """The accuracy on this run's dialogues."""
        return tuple(map(tuple, self.accuracy(model, Dialogues(Path(self.data), self.states))))

    def told(self, model: Spoken) -> dict[str, Any]:
        """What a head's configuration says of its target and its words."""
        words, hidden = model.teacher.shape
        return {
            "hidden_size": hidden,
            "vocab_size": len(model.row_of),
            "truncated_vocab_size": words,
            "target": Path(self.parent).name,
        }


class _Taught:
    """The target's distributions over the words of heads, where it says what any of these drafts."""

    def __init__(self, model: Speakers, batch: HeadBatch) -> None:
        # What head 0 drafts: the others draft some of the same.
        rows = batch.ahead(2) + 1
        with torch.no_grad():
            self.probabilities = F.linear(batch.states[rows, 0], model.teacher).float().softmax(-1)
        self.place = torch.full((len(batch.ids),), -1)
        self.place[rows] = torch.arange(len(rows))

    def at(self, rows: Tensor) -> Tensor:
        """[rows, words]."""
        return self.probabilities[self.place[rows]]
