"""A request and what serves it."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.engine.context import ContextPolicy
from hasten.engine.decoding import Decoding
from hasten.engine.drafting.drafter import Drafter
from hasten.engine.request import Request


@dataclass(eq=False, kw_only=True)
class Job(Request):
    """As the engine has it; methods see the request.

    Attributes:
        drafter: proposes for it, or fills its canvas.
        context: what is kept of it.
        decoding: how it comes to its tokens.
        forerunner: another prompt's request, behind whose first `common` rows this one begins as soon as they are read.
    """

    drafter: Drafter
    context: ContextPolicy
    decoding: Decoding
    forerunner: Job | None = None
    common: int = 0
