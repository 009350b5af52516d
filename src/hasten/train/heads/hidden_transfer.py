"""Hidden transfer: linear maps from a state in the middle of a frozen target to those of later tokens (2404.12022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hasten.errors import UserError
from hasten.methods.heads.hidden_transfer import Transfer, pseudo_rows
from hasten.train.heads.frozen import Frozen, Inserted
from hasten.train.heads.inserted import InsertedRecipe, TextBatch, Texts, standing


class TransferNetwork(nn.Module):
    """Maps [pseudo states, hidden, hidden], beside the target that they are for; they begin as no change."""

    def __init__(self, target: Frozen, count: int) -> None:
        super().__init__()
        hidden = target.model.config.hidden_size
        self.target, self.maps = target, nn.Parameter(torch.eye(hidden).repeat(count, 1, 1))


@dataclass(frozen=True)
class TransferRecipe(InsertedRecipe[TransferNetwork]):
    """Attributes beside those of all:

    share: of the target's layers, how many are below the maps.
    """

    lr: float = 1e-3
    warmup: float = 0.05
    share: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share < 1:
            raise UserError(f"share must be at least 0 and below 1, not {self.share}")

    def build(self, target: Frozen, texts: Texts) -> TransferNetwork:
        return TransferNetwork(target, self.prompts)

    def target(self, model: TransferNetwork) -> Frozen:
        return model.target

    def layer(self, target: Frozen) -> int:
        """At whose input the maps are."""
        return int(self.share * len(target.layers))

    def insert(self, model: TransferNetwork, batch: TextBatch, places: Sequence[Sequence[int]]) -> Inserted:
        sources, layer = batch.rows(places), self.layer(model.target)

        def enter(states: Tensor) -> Tensor:
            return torch.einsum("khi,pi->pkh", model.maps.to(states.dtype), states[sources]).flatten(0, 1)

        soft = pseudo_rows(model.maps, layer, self.prompts)
        return Inserted(layer, enter, *standing(batch.lengths, places, soft))

    def export(self, model: TransferNetwork, folder: Path) -> None:
        table = self.accuracy(model, Texts(Path(self.data)))
        maps = model.maps.detach().bfloat16()
        transfer = Transfer(maps, self.layer(model.target), tuple(map(tuple, table)))
        transfer.save(folder, {"hidden_size": maps.shape[1], "target": Path(self.parent).name})
