"""Medusa-2: heads, and the target that learns with them (2401.10774, sections 2.2.2 and 2.3.2).

Heads see no further than the state that they read. So the target learns to keep in it what they need, and not to say
anything else than before: its loss is KL(what it said || what it says) along its own answers (self-distillation). What
it said is its head over the states that were read before, so that it is not run a second time. The run begins with the
heads alone, as Medusa-1; what they tell the target is then given weight little by little. In the end the target is
another model, whose tokens every lossless method gives.

The authors put adapters on the head, too; here it stays, as it often is the table of tokens. Their dropout is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.errors import UserError
from hasten.methods.heads.head import beside
from hasten.model import Decoder
from hasten.model.checkpoint import resolve
from hasten.train.heads.adapted import Adapted, write_adapted
from hasten.train.heads.medusa import MedusaNetwork
from hasten.train.heads.recipe import Dialogues, HeadBatch
from hasten.train.heads.speakers import SpeakerRecipe
from hasten.train.recipe import TIMES

HEADS_FASTER = 4.0
"""The heads' learning rate over the target's, as the authors have it."""


class JointNetwork(MedusaNetwork):
    """Heads, and the target below them.

    Args:
        rank, alpha: of the target's adapters, whose products count `alpha / rank` times.
    """

    def __init__(
        self, target: Decoder, words: Tensor | None, heads: int, layers: int, shared: bool, rank: int, alpha: float
    ) -> None:
        super().__init__(target, words, heads, layers, shared)
        self.config, self.head = target.config, target.head.dequant().float()
        self.backbone = Adapted(target, rank, alpha / rank)

    def reread(self, batch: HeadBatch) -> HeadBatch:
        """The batch with the states that the target makes of it now."""
        lengths = torch.bincount(batch.dialogue).tolist()
        bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        return replace(batch, states=self.backbone(batch.ids, bounds)[:, None])

    def says(self, states: Tensor) -> Tensor:
        """Logits [rows, vocabulary] of states [rows, hidden]."""
        return F.linear(states, self.head).float()


class Reread(Dialogues):
    """Dialogues, with the states that a network makes of them now."""

    def __init__(self, folder: Path, states: str, network: JointNetwork) -> None:
        super().__init__(folder, states)
        self._network = network

    def batch(self, numbers: Sequence[int]) -> HeadBatch:
        return self._network.reread(super().batch(numbers))


@dataclass(frozen=True)
class JointRecipe(SpeakerRecipe[JointNetwork]):
    """Attributes beside those of all such heads; `lr` is the heads' before the target learns.

    rank, alpha: of the target's adapters.
    opening: share of the run in which only the heads learn.
    base_lr: the target's learning rate; that of the heads is then four times as high.
    weight: of what heads tell the target, once it has all of it. It grows with the sine of a quarter turn.

    Raises:
        UserError: out of range; a target that is no folder.
    """

    rank: int = 32
    alpha: float = 16.0
    opening: float = 0.4
    base_lr: float = 1e-4
    weight: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.rank <= 512:
            raise UserError("rank must be between 1 and 512")
        if not 0 <= self.opening < 1:
            raise UserError("opening must be a share of the run, less than 1")
        if self.base_lr <= 0 or self.alpha <= 0 or self.weight < 0:
            raise UserError("base-lr and alpha must be positive, weight must not be negative")
        if resolve(self.parent).is_file():
            raise UserError(f"{self.parent} is a GGUF file: a model that is to learn must be a folder of safetensors")

    def build(self, target: Decoder, dialogues: Dialogues) -> JointNetwork:
        words = dialogues.words(self.words, target.config.vocab_size)
        return JointNetwork(target, words, self.heads, self.layers, self.shared_head, self.rank, self.alpha)

    def optimizers(self, model: JointNetwork) -> list[torch.optim.Optimizer]:
        learning = set(model.backbone.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in model.parameters() if parameter not in learning]},
            {"params": list(model.backbone.parameters()), TIMES: 1 / HEADS_FASTER},
        ]
        return [torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=self.weight_decay, fused=True)]

    def learning_rate(self, progress: float) -> float:
        """The heads': that of a run of their own, and behind it of another one."""
        if progress < self.opening:
            return super().learning_rate(progress / self.opening)
        return HEADS_FASTER * self.base_lr / self.lr * super().learning_rate(self._joined(progress))

    def _joined(self, progress: float) -> float:
        """How much of the time is over in which the target learns."""
        return (progress - self.opening) / (1 - self.opening)

    def loss(self, model: JointNetwork, batch: HeadBatch, progress: float, generator: torch.Generator) -> Tensor:
        if progress < self.opening:
            return super().loss(model, batch, progress, generator)
        with torch.autocast("cpu", torch.bfloat16):
            now = model.reread(batch)
            apart = self.distance(model, batch, now)
        weight = self.weight * math.sin(math.pi / 2 * self._joined(progress))
        # To the heads, whose optimiser is blind to it, the loss has weight 1; to the target that which is asked for.
        states = weight * now.states + (1 - weight) * now.states.detach()
        return apart + super().loss(model, replace(now, states=states), progress, generator)

    def distance(self, model: JointNetwork, before: HeadBatch, now: HeadBatch) -> Tensor:
        """KL(what the target said || what it says), the mean over its answers' rows (nats)."""
        rows = before.ahead(1)
        with torch.no_grad():
            said = model.says(before.states[rows, 0]).log_softmax(-1)
        return F.kl_div(model.says(now.states[rows, 0]).log_softmax(-1), said, reduction="batchmean", log_target=True)

    def measured(self, model: JointNetwork) -> tuple[tuple[float, ...], ...]:
        """The accuracy on this run's dialogues, read by the target that it is now."""
        return tuple(map(tuple, self.accuracy(model, Reread(Path(self.data), self.states, model))))

    def export(self, model: JointNetwork, folder: Path) -> None:
        """A checkpoint, with its heads where they are looked for."""
        write_adapted(resolve(self.parent), folder, model.config, model.backbone.added())
        heads = beside(folder, "medusa")
        model.weights(self.store, self.measured(model)).save(heads, {**self.told(model), "target": folder.name})
