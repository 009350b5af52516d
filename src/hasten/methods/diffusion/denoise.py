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

from hasten.engine import Knob, Request, View, register
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
    role="denoiser",
    family="diffusion",
    exactness="lossy",
    paper="2502.09992",
    title="Denoising: so many tokens per pass, the surest first",
    parameters=DenoiseParameters,
    knob=Knob("per_step", (1, 2, 3, 4, 6, 8, 16, 32)),
)
class Denoise(BlockDenoiser[DenoiseParameters]):
    """Commits the same number of positions after each look, in the order of `scores` or at random."""

    def update(self, request: Request, view: View) -> None:
        if self.parameters.order == "random":
            coins = request.sampler.coins(view.canvas.steps, ORDER_COINS)
            order = torch.tensor([coins.draw() for _ in range(len(view.masked))], dtype=torch.float64)
        else:
            order = scores(self.parameters.order, view)
        view.commit(view.best(order, self.parameters.per_step))


def scores(order: str, view: View) -> Tensor:
    """float64 [rows]: the larger, the sooner, by `confidence`, `margin` or `entropy`."""
    return {"confidence": lambda: view.confidence, "margin": lambda: view.margin, "entropy": lambda: -view.entropy}[
        order
    ]()
