"""Which layers' slots a cache keeps together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.errors import UserError
from hasten.model.config import LayerConfig, Slots, SlotsOf


@dataclass(frozen=True)
class Group:
    """Layers of one shape that always have the same slots."""

    layers: tuple[int, ...]
    slots: Slots


class Layout:
    """Groups of layers, and where each layer finds its slots.

    Args:
        layers: of the model.
        groups: each layer with slots of its own is in one of them.

    Attributes:
        group_of: per layer the number of its group; -1 where it reads no slots.
        index_of: per layer its place among the layers of that group.
    """

    def __init__(self, layers: Sequence[LayerConfig], groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)
        found = {
            layer: (number, index) for number, group in enumerate(groups) for index, layer in enumerate(group.layers)
        }
        for number, layer in enumerate(layers):
            if isinstance(layer.keeps, SlotsOf):
                owner = layer.keeps.layer
                if owner >= number or owner not in found:
                    raise UserError(f"layer {number} reads the slots of layer {owner}, which has none by then")
                found[number] = found[owner]
        places = [found.get(number, (-1, -1)) for number in range(len(layers))]
        self.group_of = tuple(group for group, _ in places)
        self.index_of = tuple(index for _, index in places)
        self._places: dict[tuple[int, ...], Tensor] = {}

    def addresses(self, layers: tuple[int, ...]) -> tuple[int, int]:
        """Of both in memory, for some of the layers: int64 [layers] each."""
        places = self._places.get(layers)
        if places is None:
            found = [[where[layer] for layer in layers] for where in (self.group_of, self.index_of)]
            places = self._places[layers] = torch.tensor(found, dtype=torch.int64)
        return places.data_ptr(), places.data_ptr() + places.nbytes // 2


def by_shape(layers: Sequence[LayerConfig]) -> list[Group]:
    """Layers with slots of one shape together, in order of first appearance."""
    found: dict[Slots, list[int]] = {}
    for number, layer in enumerate(layers):
        if isinstance(layer.keeps, Slots):
            found.setdefault(layer.keeps, []).append(number)
    return [Group(tuple(members), slots) for slots, members in found.items()]
