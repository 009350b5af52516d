"""LocalLeap: looser commits near tokens that the model is very sure of.

"Accelerating Diffusion LLM Inference via Local Determinism Propagation" (2510.07081). Next to a masked position of
confidence >= `anchor`, predictions of moderate confidence (`relaxed`) are mostly final, too; how often falls with the
distance, so that the lower threshold holds only up to `radius` positions away, measured on the canvas. Without an
anchor the surest position alone is committed. With `radius=0` or `relaxed=anchor` it is threshold decoding; with
`anchor` above 1 one token per pass. Exactness: lossy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from hasten.engine import Knob, Request, View, register
from hasten.errors import require
from hasten.methods.diffusion.block_denoiser import BlockDenoiser, BlockParameters


@dataclass(frozen=True)
class LocalLeapParameters(BlockParameters):
    """Probabilities `anchor` and `relaxed`, and how many positions to either side of an anchor the latter holds.

    Raises:
        UserError: out of range.
    """

    anchor: float = 0.9
    relaxed: float = 0.75
    radius: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = (
            (0 <= self.relaxed <= self.anchor, "0 <= relaxed <= anchor must hold"),
            (self.radius >= 0, "radius must not be negative"),
        )
        require(checks, "localleap")


@register(
    "localleap",
    role="denoiser",
    family="diffusion",
    exactness="lossy",
    paper="2510.07081",
    title="LocalLeap: a lower threshold near certain positions",
    parameters=LocalLeapParameters,
    knob=Knob("relaxed", (0.9, 0.75, 0.6, 0.45, 0.3)),
)
class LocalLeap(BlockDenoiser[LocalLeapParameters]):
    """Commits nearly certain positions, and likely ones in their neighbourhood; the surest one in any case."""

    def update(self, request: Request, view: View) -> None:
        own = self.parameters
        anchors = view.open & (view.confidence >= own.anchor)
        # A dilation: rows of a view are neighbours on the canvas.
        near = F.max_pool1d(anchors.float()[None, None], 2 * own.radius + 1, stride=1, padding=own.radius)[0, 0] > 0
        likely = view.open & near & (view.confidence >= own.relaxed)
        view.commit(anchors | likely | view.best(view.confidence))
