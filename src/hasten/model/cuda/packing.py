"""A pass as numbers: everything its kernels need to know, in one buffer that one copy takes to the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.model.cuda.attention import MAX_PENDING, SPAN_WORDS, TILE_WORDS, VIEW_WORDS, Packed
from hasten.model.cuda.softmax import SPLIT
from hasten.model.rows import Rows

INPUT_WORDS = 4
MAX_VIEWS = 8
"""Blocks of a sequence, as a chain of forks makes them; a power of two."""


class Room:
    """Fixed memory for passes of up to `rows` rows, so that a captured graph finds every pass in the same place.

    Attributes:
        inputs, owners: as in `open_pass`.
        wanted: int64 [rows], the numbers of the rows whose logits are wanted, then zeros.
        logits: float32 [rows, vocabulary], of the latest pass.
    """

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        self.rows = rows
        # Views come last: only those that there are need to be copied.
        sizes = [INPUT_WORDS, rows, rows, TILE_WORDS * rows, SPAN_WORDS * rows, MAX_VIEWS * VIEW_WORDS * rows]
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=on_gpu)
        self._words = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self._copied = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        sections = torch.split(self._words, sizes)
        self.inputs, self.owners, self.wanted, self._tiles, self._spans, self._views = sections
        self._visible = torch.zeros(rows, dtype=torch.int32, device=device)
        self._table = torch.zeros(rows, MAX_PENDING, dtype=torch.int32, device=device)
        self.logits = torch.empty(rows, vocabulary, device=device)

    def fill(self, inputs: Sequence[int], rows: Rows, low: int, high: int, wanted: Sequence[int], tile: int) -> Packed:
        """Describe the rows `low:high` of a pass whose rows are pending already.

        Args:
            inputs: addresses of these rows' tokens, positions and embeddings.
            rows: the pass. Masks are read on the device while the pass runs.
            wanted: numbers among these rows, each at most once.
            tile: rows that a program of the attention serves.
        """
        room = self.rows
        owners, tiles = [-1] * room, [0] * (TILE_WORDS * room)
        spans: list[int] = []
        views: list[int] = []
        number = most_slots = most_views = 0
        for span in rows.spans:
            start, stop = max(span.start, low), min(span.stop, high)
            if start >= stop:
                continue
            index, first = len(spans) // SPAN_WORDS, start - low
            for row in range(first, stop - low, tile):
                tiles[TILE_WORDS * number : TILE_WORDS * (number + 1)] = row, min(tile, stop - low - row), index
                number += 1
            owners[first : stop - low] = [index] * (stop - start)
            blocks, committed, first_view = span.sequence.memory(0), 0, len(views) // VIEW_WORDS
            assert blocks is not None
            for block, length in blocks:
                views += committed, block.keys.data_ptr(), block.capacity
                committed += length
            before = span.sequence.pending - (span.stop - start)
            mask, stride = 0, 0
            if isinstance(span.mask, Tensor):
                stride = span.mask.shape[1]
                mask = span.mask.data_ptr() + (start - span.start) * stride
            spans += first, before, committed, mask, stride, first_view, len(blocks)
            most_slots = max(most_slots, committed + span.sequence.pending)
            most_views = max(most_views, len(blocks))
        spans += [0] * (SPAN_WORDS * room - len(spans))
        self._copy([*inputs, 0, *owners, *wanted, *[0] * (room - len(wanted)), *tiles, *spans, *views])
        splits, held = _power(-(-most_slots // SPLIT)), _power(most_views)
        return Packed(self._tiles, self._spans, self._views, self._visible, self._table, splits, held)

    def _copy(self, words: list[int]) -> None:
        """To the device; the host goes on, and waits only where it would overwrite what is still being copied."""
        if self._copied is not None:
            self._copied.synchronize()
        count = len(words)
        self._host[:count] = torch.tensor(words)
        self._words[:count].copy_(self._host[:count], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


def _power(count: int) -> int:
    """The next power of two: graphs are captured for few counts."""
    return 1 << max(0, count - 1).bit_length()


def fits(rows: Rows) -> bool:
    """Whether a pass (before its rows are pending) is within what a room holds: masks, and blocks of plain memory.

    Rows that enter in its middle are not.
    """
    for span in rows.spans:
        blocks = span.sequence.memory(0) if len(span.sequence.layout.groups) == 1 else None
        if blocks is None or len(blocks) >= MAX_VIEWS:
            return False
        if isinstance(span.mask, Tensor) and span.mask.shape[1] > MAX_PENDING:
            return False
    return rows.positions.dim() == 1 and not rows.joins


def sees_ahead(mask: Tensor) -> bool:
    """Whether any row of a mask [rows, pending] sees a later one."""
    rows, pending = mask.shape
    return bool(mask.triu(pending - rows + 1).any())
