"""The unified maximum of each head: calibrated as a model decodes, counted, and given up where it does not serve.

FlashDecoding++ (arXiv 2311.01282) takes weights from a constant instead of the largest score. Any constant gives the
same softmax, as long as no sum of weights leaves what float32 holds well. Heads differ, so each has its own: the middle
of what the log-sum-exps of its splits were in the first rows. All is kept and decided on the device: nothing waits.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

CALIBRATION_ROWS = 256
"""Rows that a model computes with running maxima before heads get their constant."""
WIDEST = 100.0
"""Log-sum-exps of a head that were further apart leave too little room around them (sums may be e^-60 to e^60)."""
REVIEW_PASSES = 64
"""Passes between two reviews of the counts."""
WINDOW = 1000
"""Splits of rows that a head is judged by."""
MOST_AGAIN = 0.01
"""Share of them that may be computed again."""


class Unified:
    """The state of one model's heads.

    Attributes:
        phi: float32 [layers, heads]; infinite where running maxima are taken.
        ranges: float32 [layers, heads, 2], the least and the largest log-sum-exp of a split without a unified maximum.
        counts: int32 [layers, heads, 2], since a head was last judged: splits of rows with a unified maximum, and how
            many of these were computed again.
    """

    def __init__(self, layers: int, heads: int, kv_heads: int, device: torch.device) -> None:
        self.phi = torch.full((layers, heads), inf, device=device)
        self.ranges = torch.tensor([inf, -inf], device=device).repeat(layers, heads, 1)
        self.counts = torch.zeros(layers, heads, 2, dtype=torch.int32, device=device)
        self._judged = torch.zeros(layers, heads, 2, dtype=torch.int64, device=device)
        self._kv_heads, self._rows, self._passes = kv_heads, 0, 0

    def passed(self, rows: int) -> None:
        """A pass of so many rows was started: calibrates when there were enough, and reviews from time to time."""
        before, self._rows, self._passes = self._rows, self._rows + rows, self._passes + 1
        if before < CALIBRATION_ROWS <= self._rows:
            self._calibrate()
        elif self._passes % REVIEW_PASSES == 0:
            self._review()

    def statistics(self) -> dict[str, int]:
        """Reads the device: `heads` of all layers, `unified` ones of them, `splits` of rows that had a unified maximum,
        and how many of these were computed `again`."""
        splits, again = (self.counts + self._judged).sum((0, 1)).tolist()
        return {
            "heads": self.phi.numel(), "unified": int(self.phi.isfinite().sum()), "splits": splits, "again": again,
        }  # fmt: skip

    def _calibrate(self) -> None:
        """The middle of each head's range, if it is narrow enough; heads of one key head have it together."""
        low, high = self.ranges.unbind(-1)
        self.phi.copy_((low + high) / 2)
        width = high - low
        self._give_up(((width >= 0) & (width <= WIDEST)).logical_not())

    def _review(self) -> None:
        """Judge the heads that were counted often enough."""
        splits, again = self.counts.unbind(-1)
        judged = splits >= WINDOW
        self._give_up(judged & (again > MOST_AGAIN * splits))
        self._judged += self.counts * judged[..., None]
        self.counts *= judged.logical_not()[..., None]

    def _give_up(self, heads: Tensor) -> None:
        """Running maxima from now on for these [layers, heads], and those that share their key heads."""
        groups = heads.view(heads.shape[0], self._kv_heads, -1)
        self.phi.masked_fill_(groups.any(-1, keepdim=True).expand_as(groups).reshape(heads.shape), inf)
