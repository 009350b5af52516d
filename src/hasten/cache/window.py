"""Which slots the rows of a pass see through a sliding window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Band:
    """Which slots a windowed layer's rows see: computed once per pass and window, used by all such layers.

    `committed` has, per view, runs (start, stop, additive mask or None, blind rows); `own` is the mask of the
    rows among themselves.
    """

    committed: list[list[tuple[int, int, Tensor | None, Tensor | None]]]
    own: Tensor

    @classmethod
    def of(cls, committed: Sequence[Tensor], waiting: Tensor, window: int, mask: Tensor) -> Band:
        """Of the committed slots' positions, those of the pending rows, and the additive mask of this pass's rows."""
        rows = waiting[waiting.shape[0] - mask.shape[0] :]
        first, last = int(rows.min()), int(rows.max())
        bands = []
        for slots in committed:
            seen = slots > first - window
            # Slots every row sees need no mask; the edge of the window does.
            free = slots > last - window
            pieces: list[tuple[int, int, Tensor | None, Tensor | None]] = []
            for start, stop in _runs(seen):
                cut = start + int((~free[start:stop]).sum())
                if bool(free[cut:stop].all()):
                    bounds = [(start, cut, True), (cut, stop, False)]
                else:
                    bounds = [(start, stop, True)]
                for low, high, edge in bounds:
                    if low == high:
                        continue
                    if not edge:
                        pieces.append((low, high, None, None))
                        continue
                    allowed = slots[None, low:high] > rows[:, None] - window
                    extra = torch.zeros(allowed.shape, dtype=mask.dtype, device=rows.device).masked_fill_(
                        ~allowed, -torch.inf
                    )
                    pieces.append((low, high, extra, ~allowed.any(1)))
            bands.append(pieces)
        outside = waiting[None, :] <= rows[:, None] - window
        return cls(bands, mask.masked_fill(outside, -torch.inf))


def _runs(flags: Tensor) -> list[tuple[int, int]]:
    """The runs (start, stop) of True in a boolean vector."""
    padded = torch.cat([flags.new_zeros(1), flags, flags.new_zeros(1)]).to(torch.int8)
    edges = padded.diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
