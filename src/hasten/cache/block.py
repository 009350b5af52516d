"""A block: contiguous slots of keys and values for the layers of a group, shared by reference count."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hasten.model.layout import Group
from hasten.model.pages import on_large_pages


class Block:
    """Slots `0 .. capacity-1` of all layers of a group, so that a commit is one gather.

    Attributes:
        keys: [layers, heads, capacity, key_width].
        values: [layers, heads, capacity, value_width]; in memory right behind the keys.
        positions: int64 [capacity], the position each slot's row had.
        addresses: of these three in memory.
        references: how many sequences read the block.
        shared: slots below this are visible to a sequence other than the writer, and are never overwritten.
    """

    def __init__(self, group: Group, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity = capacity
        planes, widths = (len(group.layers), group.slots.heads), (group.slots.key_width, group.slots.value_width)
        sizes = [planes[0] * planes[1] * capacity * width for width in widths]
        # A block made inside of a forward pass is written outside of it, too.
        with torch.inference_mode(False):
            memory = torch.empty(sum(sizes), dtype=dtype, device=device)
            if device.type == "cpu":
                on_large_pages(memory)
            self.keys, self.values = (
                part.view(*planes, capacity, width)
                for part, width in zip(torch.split(memory, sizes), widths, strict=True)
            )
            self.positions = torch.empty(capacity, dtype=torch.int64, device=device)
        self.addresses = self.keys.data_ptr(), self.values.data_ptr(), self.positions.data_ptr()
        self.references = 1
        self.shared = 0

    @staticmethod
    def bytes_for(group: Group, capacity: int, dtype: torch.dtype) -> int:
        """What a block of this capacity takes, before it is made."""
        channels = len(group.layers) * group.slots.heads * (group.slots.key_width + group.slots.value_width)
        bytes_each: int = channels * dtype.itemsize + torch.int64.itemsize
        return capacity * bytes_each

    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.positions.nbytes

    def copy_from(self, other: Block, stop: int) -> None:
        """Take over the first slots of another block of the same group, `0 .. stop-1`."""
        self.keys[:, :, :stop] = other.keys[:, :, :stop]
        self.values[:, :, :stop] = other.values[:, :, :stop]
        self.positions[:stop] = other.positions[:stop]

    def take(self, other: Block, slots: Sequence[int], to: int) -> None:
        """Some slots of a block of the same group, perhaps of this one, become `to ..`, in all layers at once."""
        index, end = torch.tensor(slots, device=self.positions.device), to + len(slots)
        self.keys[:, :, to:end] = other.keys.index_select(2, index)
        self.values[:, :, to:end] = other.values.index_select(2, index)
        self.positions[to:end] = other.positions[index]
