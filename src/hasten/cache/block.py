"""A block: contiguous slots of keys and values for every attention layer, shared by reference count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.model.config import LayerConfig


@dataclass(frozen=True)
class Group:
    """Attention layers of one shape; a block keeps each group in one tensor, so a commit is one gather."""

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int


def group_layers(layers: Sequence[LayerConfig]) -> list[Group]:
    """Attention layers by (kv_heads, head_dim), in order of first appearance."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, layer in enumerate(layers):
        if layer.kind == "attention":
            groups.setdefault((layer.kv_heads, layer.head_dim), []).append(index)
    return [Group(tuple(members), *shape) for shape, members in groups.items()]


class Block:
    """Slots `0 .. capacity-1` for all attention layers.

    Attributes:
        storage: per group, [2 (keys, values), layers, kv_heads, capacity, head_dim].
        positions: int64 [capacity], the position each slot's row had.
        references: how many sequences read the block.
        shared: slots below this are visible to a sequence other than the writer, and are never overwritten.
    """

    def __init__(self, groups: Sequence[Group], capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity = capacity
        # A block made inside of a forward pass is written outside of it, too.
        with torch.inference_mode(False):
            self.storage = [
                torch.empty(2, len(g.layers), g.kv_heads, capacity, g.head_dim, dtype=dtype, device=device)
                for g in groups
            ]
            self.positions = torch.empty(capacity, dtype=torch.int64, device=device)
        self.references = 1
        self.shared = 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        for group, tensor in zip(groups, self.storage, strict=True):
            for index, layer in enumerate(group.layers):
                self.keys[layer], self.values[layer] = tensor[0, index], tensor[1, index]

    @staticmethod
    def bytes_for(groups: Sequence[Group], capacity: int, dtype: torch.dtype) -> int:
        """What a block of this capacity takes, before it is made."""
        channels = sum(2 * len(g.layers) * g.kv_heads * g.head_dim for g in groups)
        return capacity * (channels * dtype.itemsize + torch.int64.itemsize)

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.storage) + self.positions.nbytes

    def copy_from(self, other: Block, start: int, stop: int) -> None:
        """Take over the slots `start:stop` of another block of the same groups, as this block's first."""
        count = stop - start
        for mine, theirs in zip(self.storage, other.storage, strict=True):
            mine[:, :, :, :count] = theirs[:, :, :, start:stop]
        self.positions[:count] = other.positions[start:stop]

    def gather(self, start: int, kept: Sequence[int]) -> None:
        """Move slots `start + kept[i]` to `start + i`, in all layers at once; `kept` ascends strictly."""
        index = torch.tensor(kept, device=self.positions.device) + start
        stop = start + len(kept)
        for tensor in self.storage:
            tensor[:, :, :, start:stop] = tensor.index_select(3, index)
        self.positions[start:stop] = self.positions[index]
