"""A model cut between its layers: each segment is a model that reads what the one before gives, with slots of its own.

So a row may stop behind any segment. Later segments read it when they are next asked, together with what is new: their
slots then are those of a model that never stopped. Norm and head are shared: each segment's logits are those of the
model without the layers behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from hasten.cache import Cache, SequenceCache, SlotCache
from hasten.cache.block import Block
from hasten.cache.cache import MINIMUM_BLOCK, MakeGroup
from hasten.model import Decoder, Rows, Slots, Span, Taps
from hasten.model.layers import Layer
from hasten.model.layout import Layout, by_shape
from hasten.model.taps import Site


def cut(model: Decoder, exits: Sequence[int]) -> list[Decoder]:
    """The segments that end behind so many layers each; the last is the model's last layer.

    Raises:
        ValueError: layers that keep anything but slots of their own.
    """
    if not all(isinstance(layer.keeps, Slots) for layer in model.config.layers):
        raise ValueError("a layer that keeps no slots of its own cannot be cut off")
    return [
        replace(
            model,
            config=replace(model.config, layers=model.config.layers[start:stop]),
            layers=[_numbered(layer, number) for number, layer in enumerate(model.layers[start:stop])],
            # A backend knows one model at a time.
            backend=copy(model.backend),
        )
        for start, stop in pairwise((0, *exits))
    ]


def _numbered(layer: Layer, number: int) -> Layer:
    """The same layer at another place."""
    other = copy(layer)
    other.index = number
    return other


@dataclass
class Lot:
    """Rows of one sequence that the next segment reads.

    Attributes:
        states: [rows, hidden], what the segment before it gave, before any norm.
        positions: int64 [rows].
    """

    states: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def behind(self, earlier: Lot | None) -> Lot:
        """With the rows of an earlier lot before them."""
        if earlier is None:
            return self
        return Lot(torch.cat([earlier.states, self.states]), torch.cat([earlier.positions, self.positions]))


class SegmentedSequence(SequenceCache):
    """The first segment's cache of a sequence, and with it those of the `later` ones.

    All have the same committed rows. Of pending ones, later segments may have read fewer.

    Attributes:
        waiting: for each later segment, the pending rows that it has not read; None where it has read all.
    """

    def __init__(self, first: SequenceCache, cache: Cache, later: list[SequenceCache]) -> None:
        super().__init__(cache, first.layout, first.groups)
        self.later = later
        self.waiting: list[Lot | None] = [None] * len(later)

    def part(self, segment: int) -> SequenceCache:
        """The cache of one segment."""
        return self.later[segment - 1] if segment else self

    def reserve(self, slots: int, more: int = 0) -> None:
        super().reserve(slots, more)
        for each in self.later:
            each.reserve(slots, more)

    def commit(self, kept: int | Sequence[int]) -> None:
        super().commit(kept)
        for each in self.later:
            each.commit(kept)
        self.waiting = [None] * len(self.later)

    def crop(self, length: int) -> None:
        super().crop(length)
        for each in self.later:
            each.crop(length)
        self.waiting = [None] * len(self.later)

    def release(self) -> None:
        super().release()
        for each in self.later:
            each.release()
        self.waiting = [None] * len(self.later)


class SegmentedCache(Cache):
    """The cache of a model's segments: one ledger for all."""

    def __init__(self, model: Decoder, segments: Sequence[Decoder]) -> None:
        super().__init__(model.config.layers, model.cache_dtype, model.device)
        self._layouts = [Layout(each.config.layers, by_shape(each.config.layers)) for each in segments]

    def sequence(self, layout: Layout | None = None, make: MakeGroup = SlotCache) -> SegmentedSequence:
        """An empty sequence, in the segments' own layouts."""
        first, *later = [super(SegmentedCache, self).sequence(each, make) for each in self._layouts]
        return SegmentedSequence(first, self, later)

    def sequence_bytes(self, slots: int) -> int:
        most = max(slots, MINIMUM_BLOCK)
        groups = [group for layout in self._layouts for group in layout.groups]
        return sum(Block.bytes_for(group, most, self.dtype) for group in groups)


def read(
    segments: Sequence[Decoder],
    number: int,
    sequences: Sequence[SegmentedSequence],
    lots: Sequence[Lot],
    extend: bool,
    wanted: Sequence[int],
) -> tuple[Tensor, list[Lot]]:
    """One segment's pass over a lot of rows of each sequence, which stay pending there.

    Args:
        extend: whether they stand behind rows that are pending already.
        wanted: rows of all lots together whose logits are asked for.

    Returns:
        Logits [wanted, vocabulary], and what the segment gives to the next one.
    """
    segment = segments[number]
    bounds = [0, *accumulate(map(len, lots))]
    last: tuple[Site, int] = ("output", len(segment.layers) - 1)
    spans = [
        Span(sequence.part(number), start, stop, extend=extend)
        for sequence, (start, stop) in zip(sequences, pairwise(bounds), strict=True)
    ]
    positions, states = torch.cat([lot.positions for lot in lots]), torch.cat([lot.states for lot in lots])
    taps = Taps([last])
    logits = segment.forward(Rows(torch.full_like(positions, -1), positions, spans, states), wanted, taps)
    given = zip(torch.split(taps[last], [len(lot) for lot in lots]), lots, strict=True)
    return logits, [Lot(rows, lot.positions) for rows, lot in given]
