"""The baseline of diffusion decoding: a fixed number of tokens per forward pass, the surest (or random) ones first.

LLaDA (2502.09992), section 2.4: low-confidence remasking, semi-autoregressive over blocks; Dream (2508.15487) for the
other orders. With `per_step=1` it is the yardstick of every other method, and what `plain` is for these models.
Exactness: lossless by definition with one token per pass and no stale cache; more tokens per pass are drawn from a
product of marginals, which no model can make right (see `hasten.tasks.parallelbench`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.engine import Request, Target, View, register
from hasten.errors import require
from hasten.methods.diffusion.block_denoiser import BlockDenoiser, BlockParameters

ORDERS = ("confidence", "random", "margin", "entropy")
ORDER_COINS = 1


@dataclass(frozen=True)
class DenoiseParameters(BlockParameters):
    """`per_step` tokens per pass, in the order of `confidence` (probability of the token), `margin` (between the two
    likeliest), `entropy` (least first), or `random` (uniformly).

    Raises:
        UserError: out of range.
    """

    per_step: int = 1
    order: str = "confidence"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = (
            (self.per_step >= 1, "per_step must be at least 1"),
            (self.order in ORDERS, f"order must be one of {', '.join(ORDERS)}, not {self.order!r}"),
        )
        require(checks, "denoise")


@register(
    "denoise",
    family="diffusion",
    exactness="lossy",
    paper="2502.09992",
    title="Denoising: so many tokens per forward pass, the surest first",
    parameters=DenoiseParameters,
)
class Denoise(BlockDenoiser[DenoiseParameters]):
    """See the module."""

    def update(self, request: Request, view: View) -> None:
        view.commit(view.best(self._scores(request, view), self.parameters.per_step))

    def _scores(self, request: Request, view: View) -> Tensor:
        """[rows]: the larger, the sooner."""
        order = self.parameters.order
        if order == "random":
            coins = request.sampler.coins(view.canvas.steps, ORDER_COINS)
            return torch.tensor([coins.draw() for _ in range(len(view.masked))], dtype=torch.float64)
        if order == "margin":
            return view.margin
        return -view.entropy if order == "entropy" else view.confidence


def static(target: Target, parameters: BlockParameters) -> Denoise:
    """One token per pass, the surest first, with the same blocks and cache as another method's parameters."""
    names = ("block", "cache", "refresh", "canvas", "part")
    return Denoise(target, DenoiseParameters(**{name: getattr(parameters, name) for name in names}))
