"""The KV cache: makes sequences and blocks, and keeps the ledger of their bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch

from hasten.cache.block import Block
from hasten.cache.sequence import SequenceCache
from hasten.cache.slots import GroupCache, SlotCache
from hasten.errors import UserError
from hasten.model.config import LayerConfig, State
from hasten.model.layout import Group, Layout, by_shape

MINIMUM_BLOCK = 64
MakeGroup = Callable[["Cache", Group], GroupCache]


class Cache:
    """All sequences of one model.

    Args:
        layers: the model's layers.
        dtype, device: of keys and values.
        limit_bytes: refuse to grow past this many bytes.

    Attributes:
        layout: which layers' slots are kept together, unless a sequence has a layout of its own.
        used_bytes, peak_bytes: bytes held by live blocks and states, now and at most.
        state_bytes: of a sequence's recurrent states (in float32), however long it is.
    """

    def __init__(
        self,
        layers: Sequence[LayerConfig],
        dtype: torch.dtype,
        device: torch.device,
        limit_bytes: int | None = None,
    ) -> None:
        self.layers, self.dtype, self.device, self.limit_bytes = tuple(layers), dtype, device, limit_bytes
        self.layout = Layout(layers, by_shape(layers))
        shapes = [shape for layer in layers if isinstance(layer.keeps, State) for shape in layer.keeps.shapes]
        self.state_bytes = sum(map(prod, shapes)) * torch.float32.itemsize
        self.used_bytes = self.peak_bytes = 0

    def sequence(self, layout: Layout | None = None, make: MakeGroup = SlotCache) -> SequenceCache:
        """An empty sequence.

        Args:
            layout: groups of layers; by default all of one shape together.
            make: what keeps a group's slots; by default all of them, as they are.
        """
        own = layout or self.layout
        return SequenceCache(self, own, [make(self, group) for group in own.groups])

    def sequence_bytes(self, slots: int) -> int:
        """What a fresh sequence with room for so many slots takes, if it keeps all of them."""
        most = max(slots, MINIMUM_BLOCK)
        return self.state_bytes + sum(Block.bytes_for(group, most, self.dtype) for group in self.layout.groups)

    def fits(self, slots: int) -> bool:
        """Whether a sequence of so many slots would fit if there were no other."""
        return self.limit_bytes is None or self.sequence_bytes(slots) <= self.limit_bytes

    def block(self, group: Group, capacity: int, ideal: int = 0) -> Block:
        """A fresh block with one reference.

        Args:
            group: the layers whose slots it has.
            capacity: slots that it must have.
            ideal: slots that it has if the limit allows, or as many as still fit.

        Raises:
            UserError: it does not fit into the limit.
        """
        slots = max(capacity, ideal, MINIMUM_BLOCK)
        if self.limit_bytes is not None:
            # As many of each other group as well.
            together = sum(Block.bytes_for(each, 1, self.dtype) for each in self.layout.groups)
            slots = max(capacity, min(slots, (self.limit_bytes - self.used_bytes) // together))
        self.take(Block.bytes_for(group, slots, self.dtype))
        return Block(group, slots, self.dtype, self.device)

    def drop(self, block: Block) -> None:
        """One reference less; without any, the block's memory is free."""
        block.references -= 1
        if block.references == 0:
            self.give(block.nbytes())

    def take(self, count: int) -> None:
        """Count so many bytes as used.

        Raises:
            UserError: the limit does not allow it.
        """
        wanted = self.used_bytes + count
        if self.limit_bytes is not None and wanted > self.limit_bytes:
            raise UserError(f"the KV cache is full: {wanted:,} bytes wanted, {self.limit_bytes:,} allowed")
        self.used_bytes, self.peak_bytes = wanted, max(self.peak_bytes, wanted)

    def give(self, count: int) -> None:
        """So many bytes are free again."""
        self.used_bytes -= count
