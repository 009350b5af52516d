"""Training of EAGLE heads on a frozen target's states and answers.

EAGLE-1 (2401.15077, section 4.2) makes the next final state, and is told how far off it was, by distance and by what
the target's head says of it. EAGLE-3 (2503.01840, section 3.2) is told only which words the target would have said, in
each of the steps in which it drafts on its own outputs. The head that turns outputs into words is the target's, of the
words that are drafted, and stays as it is.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.errors import UserError
from hasten.methods.heads.eagle_format import LAYER, PAIR, EagleWeights, default_taps, layer_fields
from hasten.methods.heads.head import FINAL
from hasten.methods.heads.pieces import require_store, rounded
from hasten.model import Decoder
from hasten.model.layers import Attention, GatedMLP
from hasten.model.weights import Piece
from hasten.train.heads.eagle_network import EagleLayer
from hasten.train.heads.recipe import Dialogues, HeadBatch, HeadRecipe
from hasten.train.heads.states import Tap

DEPTHS = 4
"""Tokens ahead whose accuracy is measured."""


class EagleTraining(EagleLayer):
    """The layer, and a head.

    Args:
        words: int64 [words], or None where they are the whole vocabulary.
        own_head: whether the head is trained, too; it begins as the target's, which it is otherwise.

    Attributes:
        teacher: [words, hidden], the target's head.
    """

    def __init__(self, target: Decoder, version: int, taps: int, words: Tensor | None, own_head: bool = False) -> None:
        super().__init__(target, version, taps)
        head, self.words = target.head.dequant().float(), words
        self.teacher = head if words is None else head[words]
        self.head = nn.Parameter(self.teacher.clone()) if own_head else None
        self.row_of = torch.full((len(head),), -1)
        self.row_of[torch.arange(len(head)) if words is None else words] = torch.arange(len(self.teacher))

    def says(self, finals: Tensor) -> Tensor:
        """What the target says of final states: logits [rows, words]."""
        return F.linear(finals, self.teacher).float()

    def drafts(self, outputs: Tensor) -> Tensor:
        """What is drafted of the layer's outputs: logits [rows, words]."""
        if self.version == 3:
            outputs = self.norm(outputs, "norm")
        return F.linear(outputs, self.teacher if self.head is None else self.head).float()


@dataclass(frozen=True)
class EagleRecipe(HeadRecipe[EagleTraining]):
    """Attributes beside those of all heads:

    precision: `bf16` of products, or `fp32`.
    store: what matrices are rounded to in the end: `bf16` (they are not, as the authors have it), `q8_0`, `q4_1`.
    """

    precision: str = "bf16"
    store: str = "q8_0"

    version: ClassVar[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in ("bf16", "fp32"):
            raise UserError(f"precision must be bf16 or fp32, not {self.precision!r}")
        require_store(self.store)

    @property
    def trains_head(self) -> bool:
        """Whether the head is trained."""
        return False

    @classmethod
    @abstractmethod
    def taps(cls, layers: int) -> tuple[Tap, ...]:
        """What is read of a target of so many layers; the final state is the last."""

    @abstractmethod
    def error(self, model: EagleTraining, batch: HeadBatch, generator: torch.Generator) -> Tensor:
        """The loss of a batch."""

    def build(self, target: Decoder, dialogues: Dialogues) -> EagleTraining:
        last, config = target.layers[-1], target.config
        known = isinstance(last.mixer, Attention) and isinstance(last.mlp, GatedMLP)
        if not known or config.layers[0] != config.layers[-1]:
            raise UserError("eagle: layers of this kind are not those that such a head has")
        words = dialogues.words(self.words, config.vocab_size)
        return EagleTraining(target, self.version, len(self.taps(len(config.layers))) - 1, words, self.trains_head)

    def loss(self, model: EagleTraining, batch: HeadBatch, progress: float, generator: torch.Generator) -> Tensor:
        with self._products():
            return self.error(model, batch, generator)

    def _products(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")

    @torch.inference_mode()
    def accuracy(self, model: EagleTraining, dialogues: Dialogues) -> list[float]:
        """Of each depth, how often the likeliest word was right on held-out dialogues, where all before were."""
        hits, seen = [0] * DEPTHS, [0] * DEPTHS
        for batch in dialogues.batches(dialogues.held_out, self.batch_tokens):
            with self._products():
                right_so_far = torch.ones(len(batch.ids), dtype=torch.bool)
                for depth, (rows, outputs) in enumerate(model.roll(entering(model, batch), batch, DEPTHS)):
                    right = model.row_of[batch.ids[rows + depth + 2]] == model.drafts(outputs).argmax(-1)
                    alive = right_so_far[rows]
                    seen[depth] += int(alive.sum())
                    hits[depth] += int((alive & right).sum())
                    right_so_far[rows] &= right
        return [round(hit / max(1, count), 4) for hit, count in zip(hits, seen, strict=True)]

    def export(self, model: EagleTraining, folder: Path) -> None:
        shares = self.accuracy(model, Dialogues(Path(self.data), self.states))
        kept = {name: self._stored(parameter) for name, parameter in model.weights.items()}
        names = LAYER | (PAIR if self.version == 3 else {})
        head = None if model.head is None else self._stored(model.head)
        layers = tuple(layer for site, layer in self.taps(len(model.config.layers))[:-1])
        made = EagleWeights(
            self.version, model.config, kept["fusion"], {name: kept[name] for name in names}, kept.get("norm"),
            head, model.words, None, layers if self.version == 3 else (),
        )  # fmt: skip
        told = {"target": Path(self.parent).name, "accuracy": shares}
        made.save(folder, layer_fields(model.config) | told)

    def _stored(self, weight: Tensor) -> Piece:
        """A matrix as it is to be stored; norms stay bf16."""
        return rounded(weight, self.store if weight.ndim == 2 else "bf16")


def entering(model: EagleTraining, batch: HeadBatch) -> Tensor:
    """What of a batch's states the layer reads, [rows, taps * hidden]."""
    return batch.states[:, 0] if model.version == 1 else batch.states[:, :-1].flatten(1)


@dataclass(frozen=True)
class Eagle1Recipe(EagleRecipe):
    """Attributes beside those of all EAGLE heads:

    distance, saying: weights of how far off a state is, and of what the head says of it.
    noise: of the states that are read, as a share of their size.
    """

    distance: float = 1.0
    saying: float = 0.1
    noise: float = 0.1

    version: ClassVar[int] = 1
    states: ClassVar[str] = "final_norm.bin"

    @classmethod
    def taps(cls, layers: int) -> tuple[Tap, ...]:
        return (FINAL,)

    def error(self, model: EagleTraining, batch: HeadBatch, generator: torch.Generator) -> Tensor:
        finals = batch.states[:, 0]
        drawn = torch.rand(finals.shape, generator=generator) * 2 - 1
        noisy = finals + self.noise * finals.square().mean(-1, keepdim=True).sqrt() * drawn
        for rows, outputs in model.roll(noisy, batch, 1):
            wanted = finals[rows + 1]
            said = model.says(wanted).softmax(-1)
            apart = F.smooth_l1_loss(outputs, wanted)
            return self.distance * apart + self.saying * F.cross_entropy(model.drafts(outputs), said)
        # There is no answer in it.
        nothing: Tensor = 0.0 * model.weights["fusion"].sum()
        return nothing


@dataclass(frozen=True)
class Eagle3Recipe(EagleRecipe):
    """Attributes beside those of all EAGLE heads:

    steps: how far ahead it drafts on its own outputs while it is trained.
    decay: the weight of each step's loss over that of the one before.
    own_head: whether the matrix that makes words of its outputs is trained, as the authors have it, or the target's.
    """

    steps: int = 3
    decay: float = 0.8
    own_head: bool = True

    version: ClassVar[int] = 3
    states: ClassVar[str] = "eagle3.bin"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.steps <= 8:
            raise UserError("eagle: steps must be between 1 and 8")

    @property
    def trains_head(self) -> bool:
        return self.own_head

    @classmethod
    def taps(cls, layers: int) -> tuple[Tap, ...]:
        return (*(("input", layer) for layer in default_taps(layers)), FINAL)

    def error(self, model: EagleTraining, batch: HeadBatch, generator: torch.Generator) -> Tensor:
        # Where there is no answer in it, nothing is to be learnt.
        total: Tensor = 0.0 * model.weights["fusion"].sum()
        for step, loss in enumerate(self.losses(model, batch)):
            total = total + self.decay**step * loss
        return total

    def losses(self, model: EagleTraining, batch: HeadBatch) -> list[Tensor]:
        """Of each step: cross-entropy with what the target says, where the likeliest of all words may be drafted."""
        losses = []
        first = batch.ahead(2)
        with torch.no_grad():
            said = model.says(batch.states[first + 1, -1]).softmax(-1)
        drafted = model.row_of[batch.ids[first + 2]] >= 0
        for step, (rows, outputs) in enumerate(model.roll(entering(model, batch), batch, self.steps)):
            # What this step drafts is what the first one drafts further on.
            there = torch.searchsorted(first, rows + step)
            kept = drafted[there]
            if kept.any():
                losses.append(F.cross_entropy(model.drafts(outputs[kept]), said[there[kept]]))
        return losses
