"""The KV cache: makes sequences and blocks, and keeps the ledger of their bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hasten.cache.block import Block, group_layers
from hasten.cache.sequence import SequenceCache
from hasten.errors import UserError
from hasten.model.config import LayerConfig

MINIMUM_BLOCK = 64


class Cache:
    """All sequences of one model.

    Args:
        layers: the model's layers.
        dtype, device: of keys and values.
        limit_bytes: refuse to grow past this many bytes.

    Attributes:
        used_bytes, peak_bytes: bytes held by live blocks, now and at most.
    """

    def __init__(
        self,
        layers: Sequence[LayerConfig],
        dtype: torch.dtype,
        device: torch.device,
        limit_bytes: int | None = None,
    ) -> None:
        self.layers, self.dtype, self.device, self.limit_bytes = tuple(layers), dtype, device, limit_bytes
        self._groups = group_layers(layers)
        self.used_bytes = self.peak_bytes = 0

    def sequence(self) -> SequenceCache:
        """An empty sequence."""
        return SequenceCache(self)

    def block_bytes(self, slots: int) -> int:
        """What a fresh block with room for so many slots takes."""
        return Block.bytes_for(self._groups, max(slots, MINIMUM_BLOCK), self.dtype)

    def fits(self, slots: int) -> bool:
        """Whether a block of so many slots would fit if there were no other."""
        return self.limit_bytes is None or self.block_bytes(slots) <= self.limit_bytes

    def block(self, capacity: int, ideal: int = 0) -> Block:
        """A fresh block with one reference.

        Args:
            capacity: slots that it must have.
            ideal: slots that it has if the limit allows, or as many as still fit.

        Raises:
            UserError: it does not fit into the limit.
        """
        slots = max(capacity, ideal, MINIMUM_BLOCK)
        if self.limit_bytes is not None:
            slot_bytes = Block.bytes_for(self._groups, 1, self.dtype)
            slots = max(capacity, min(slots, (self.limit_bytes - self.used_bytes) // slot_bytes))
            wanted = self.used_bytes + slots * slot_bytes
            if wanted > self.limit_bytes:
                raise UserError(f"the KV cache is full: {wanted:,} bytes wanted, {self.limit_bytes:,} allowed")
        block = Block(self._groups, slots, self.dtype, self.device)
        self.used_bytes += block.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return block

    def drop(self, block: Block) -> None:
        """One reference less; without any, the block's memory is free."""
        block.references -= 1
        if block.references == 0:
            self.used_bytes -= block.nbytes()
