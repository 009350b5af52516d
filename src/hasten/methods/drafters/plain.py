"""Plain decoding: the empty draft, and the yardstick of every other method.

For a model that fills masked positions it is one token per forward pass, the surest first, without a stale cache
(`hasten.methods.diffusion.denoise`). Exactness: lossless by definition.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.engine import Draft, Drafter, Request, Target, register
from hasten.methods.diffusion.denoise import Denoise, DenoiseParameters


@dataclass(frozen=True)
class PlainParameters:
    """Nothing to set."""


class Plain(Drafter):
    """Proposes nothing."""

    def propose(self, request: Request, budget: int) -> Draft:
        return Draft()


@register(
    "plain",
    family="drafters",
    exactness="lossless",
    paper="",
    title="Plain decoding: one token per forward pass",
    parameters=PlainParameters,
)
def plain(target: Target, parameters: PlainParameters) -> Drafter:
    """What one token per forward pass means for this model."""
    return Denoise(target, DenoiseParameters()) if target.model.config.fills_canvas else Plain()
