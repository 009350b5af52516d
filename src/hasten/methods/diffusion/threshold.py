"""Confidence-aware parallel decoding: every token that the model is sure enough of is committed at once.

Fast-dLLM (2505.22618), section 3.3: `threshold` commits what has at least a given probability; `factor` the n surest
with (n + 1)(1 - p_n) <= f, the condition of its theorem under which the likeliest tokens of the marginals are the
likeliest of the joint distribution. Both commit at least the surest. The released scan of the factor rule commits one
token too many where it fails at the last one; this is the rule as proved. The knobs' values are those of
ParallelBench's own sweep (2510.04767). Exactness: lossy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hasten.engine import Knob, Request, View, register
from hasten.errors import require
from hasten.methods.diffusion.block_denoiser import BlockDenoiser, BlockParameters


@dataclass(frozen=True)
class ThresholdParameters(BlockParameters):
    """Tokens of at least this probability are committed.

    Raises:
        UserError: out of range.
    """

    threshold: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        require(((self.threshold >= 0, "threshold must not be negative"),), "threshold")


@register(
    "threshold",
    role="denoiser",
    family="diffusion",
    exactness="lossy",
    paper="2505.22618",
    title="Fast-dLLM: all tokens above a confidence at once",
    parameters=ThresholdParameters,
    knob=Knob("threshold", (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)),
)
class Threshold(BlockDenoiser[ThresholdParameters]):
    """Commits every position of at least the threshold's confidence; the surest one in any case."""

    def update(self, request: Request, view: View) -> None:
        sure = view.open & (view.confidence >= self.parameters.threshold)
        view.commit(sure | view.best(view.confidence))


@dataclass(frozen=True)
class FactorParameters(BlockParameters):
    """`factor` is f of the rule.

    Raises:
        UserError: out of range.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(((self.factor >= 0, "factor must not be negative"),), "factor")


ROUNDING = 1e-6
"""Of confidences, so that the rule holds where exact ones meet it with equality."""


@register(
    "factor",
    role="denoiser",
    family="diffusion",
    exactness="lossy",
    paper="2505.22618",
    title="Fast-dLLM: as many tokens as are likely all together",
    parameters=FactorParameters,
    knob=Knob("factor", (0.7, 1.0, 1.3, 1.6, 1.9)),
)
class Factor(BlockDenoiser[FactorParameters]):
    """Commits the n surest positions, n the largest whose least confidence c keeps (n + 1) (1 - c) to the factor."""

    def update(self, request: Request, view: View) -> None:
        ranked = view.confidence[view.open].sort(descending=True).values
        counts = torch.arange(1, len(ranked) + 1)
        together = counts[(counts + 1) * (1 - ranked) <= self.parameters.factor + ROUNDING]
        view.commit(view.best(view.confidence, max(1, int(together.max()) if len(together) else 1)))
