"""Attention of a pass in PyTorch: what several spans see of one block is read once, for the rows of all of them.

Hydragen (arXiv 2402.05099, section 3): queries of sequences that begin alike are stacked for what they share, each
sequence attends to its own slots, and log-sum-exps join these parts exactly. Sequences that share more among themselves
are a level below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hasten.model.attention import Part, attend, kernel_for, merge
from hasten.model.rows import Span, Storage

LEAST = 256
"""Slots that spans must share for a call of their own, and merging what it gives, to pay."""


@dataclass(frozen=True)
class Level:
    """The slots `start:stop` of a block, which all rows of some spans (by number) see."""

    storage: Storage
    start: int
    stop: int
    spans: tuple[int, ...]


def levels(spans: Sequence[Span], layer: int) -> list[Level]:
    """What spans share of a layer's slots: for each of them from its first slot on, without a gap."""
    memory = [span.sequence.memory(span.sequence.layout.group_of[layer]) or () for span in spans]

    def below(numbers: Sequence[int], view: int, start: int) -> Iterator[Level]:
        """Of spans that share all slots up to here."""
        blocks: dict[int, list[int]] = {}
        for number in numbers:
            if view < len(memory[number]) and memory[number][view][1] > start:
                blocks.setdefault(id(memory[number][view][0]), []).append(number)
        for together in blocks.values():
            stop = min(memory[number][view][1] for number in together)
            if len(together) > 1 and stop - start >= LEAST:
                yield Level(memory[together[0]][view][0], start, stop, tuple(together))
                ended = [number for number in together if memory[number][view][1] == stop]
                yield from below(ended, view + 1, 0)
                yield from below([number for number in together if number not in ended], view, stop)

    return list(below(range(len(spans)), 0, 0))


def attend_spans(
    spans: Sequence[Span],
    masks: Sequence[Tensor | Literal["all"] | None],
    layer: int,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    shared: Sequence[Level] = (),
) -> Tensor:
    """Store the keys and values of a pass, then attend.

    Args:
        masks: of each span, as `hasten.model.layers.additive_mask` gives it.
        queries, keys, values: of all rows, [rows, heads or kv_heads, width] in the cache's dtype.
        shared: levels of this layer's slots; a windowed layer has none.

    Returns:
        [rows, heads * value_width].
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    behind = [0] * len(spans)
    for level in shared:
        together = [spans[number] for number in level.spans]
        index = together[0].sequence.layout.index_of[layer]
        part = Part(*(each[index][:, level.start : level.stop] for each in (level.storage.keys, level.storage.values)))
        stacked = torch.cat([queries[span.start : span.stop] for span in together])
        out, lse = attend(stacked, [part], kernel_for(queries.device))
        rows = [span.stop - span.start for span in together]
        for number, *part_of in zip(level.spans, torch.split(out, rows), torch.split(lse, rows), strict=True):
            found[number] = merge(*found[number], *part_of) if number in found else (part_of[0], part_of[1])
            behind[number] += level.stop - level.start
    outs = []
    for number, (span, mask) in enumerate(zip(spans, masks, strict=True)):
        own = slice(span.start, span.stop)
        span.sequence.write(layer, keys[own].transpose(0, 1), values[own].transpose(0, 1))
        if number in found:
            rest = span.sequence.attend_behind(layer, queries[own], mask, behind[number])
            outs.append(merge(*found[number], *rest)[0])
        else:
            outs.append(span.sequence.attend(layer, queries[own], mask)[0])
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).flatten(1)
