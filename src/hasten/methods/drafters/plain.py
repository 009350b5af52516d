"""Plain decoding: the empty draft, and the yardstick of every other method.

Exactness: lossless by definition.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.engine import Draft, Drafter, Request, Target, register


@dataclass(frozen=True)
class PlainParameters:
    """Nothing to set."""


@register(
    "plain",
    family="drafters",
    exactness="lossless",
    paper="",
    title="Plain decoding: one token per forward pass",
    parameters=PlainParameters,
)
class Plain(Drafter):
    """Proposes nothing."""

    def __init__(self, target: Target, parameters: PlainParameters) -> None:
        pass

    def propose(self, request: Request, budget: int) -> Draft:
        return Draft()
