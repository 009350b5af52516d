"""`hasten train s2d`: a drafter whose first layers are drafters, too.

"S2D: Sorted Speculative Decoding For More Efficient Deployment of Nested Large Language Models", 2024, arXiv
2407.01955: one loss over all sub-models, which share the final norm and the head, in the same pass and with equal
weights. The paper's loss is cross-entropy on text; what the target gives all words tells a drafter more, so `kl` is
the default here. The exits' threshold is then the best of some on the dialogues that were held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.errors import UserError
from hasten.methods.drafters.s2d import EXITS, THRESHOLDS, read_exits
from hasten.model import Decoder
from hasten.train.drafters.align import AlignRecipe, Measured
from hasten.train.drafters.network import DrafterNetwork
from hasten.train.heads.recipe import Dialogues

CANDIDATES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""The paper's range of thresholds."""
LENGTH = 5
"""Tokens of the drafts that a threshold is chosen for."""


@dataclass(frozen=True)
class SortedRecipe(AlignRecipe):
    """Attributes beside those of an aligned drafter:

    leaves: numbers of layers behind which the model drafts, ascending, with `/` between; the last has all of them.
    """

    layers: int = 6
    distance: str = "kl"
    leaves: str = "2/4/6"

    def __post_init__(self) -> None:
        super().__post_init__()
        read_exits(self.leaves)
        if not self.base and self.exits[-1] != self.layers:
            raise UserError(f"exits must end with {self.layers}, the number of layers, not {self.exits[-1]}")

    @property
    def exits(self) -> tuple[int, ...]:
        return read_exits(self.leaves)

    def build(self, target: Decoder, dialogues: Dialogues) -> DrafterNetwork:
        network = super().build(target, dialogues)
        depth = network.model.config.num_hidden_layers
        if self.exits[-1] != depth:
            raise UserError(f"exits must end with {depth}, the number of the base's layers, not {self.exits[-1]}")
        return network

    def told(self, model: DrafterNetwork, target: Decoder, measured: Sequence[Measured]) -> dict[str, Any]:
        layer = sum(parameter.numel() for parameter in model.model.model.layers[0].parameters())
        head, whole = model.head.shape[0] * model.model.config.hidden_size, target.weight_bytes() / 4
        # A token that leaves at the n-th exit asked the head n times.
        costs = [(depth * layer + asked * head) / whole for asked, depth in enumerate(model.exits, 1)]
        threshold = best_threshold(measured, costs)
        return {EXITS: list(model.exits), THRESHOLDS: [threshold] * (len(model.exits) - 1)}


def best_threshold(measured: Sequence[Measured], costs: Sequence[float], length: int = LENGTH) -> float:
    """The threshold at which chains of so many tokens give most per time: (1 + accepted) / (1 + their cost).

    Args:
        measured: each exit on the same rows.
        costs: of a token that leaves there, in passes of the target.
    """

    def rate(threshold: float) -> float:
        left = first_sure([each.confidence for each in measured], [threshold] * (len(measured) - 1))
        agrees = torch.stack([each.agrees for each in measured]).gather(0, left.unsqueeze(0)).float().mean()
        accepted = sum(float(agrees) ** depth for depth in range(1, length + 1))
        return (1 + accepted) / (1 + length * float(torch.tensor(costs)[left].mean()))

    return max(CANDIDATES, key=rate)


def first_sure(confidences: Sequence[Tensor], thresholds: Sequence[float]) -> Tensor:
    """int64 [rows]: the first exit whose confidence is above its threshold, else the last."""
    sure = torch.stack([each > least for each, least in zip(confidences, thresholds, strict=False)])
    last = torch.ones(1, sure.shape[1], dtype=torch.bool)
    return torch.cat([sure, last]).int().argmax(0)
