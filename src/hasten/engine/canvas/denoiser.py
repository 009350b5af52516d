"""The interface of a denoiser: what fills a canvas, for models that predict masked positions."""

from __future__ import annotations

from hasten.engine.canvas.canvas import Canvas
from hasten.engine.canvas.window import Passes
from hasten.engine.drafting.draft import Draft
from hasten.engine.drafting.drafter import Drafter
from hasten.engine.request import Request
from hasten.model import ModelConfig


class Denoiser(Drafter):
    """Fills a request's canvas, pass by pass. One object serves all requests of the same method and parameters.

    What it commits is final, so the text is handed out as far as no mask stands before it, and the request is over as
    soon as that part ends: with end of text, a stop string or the budget of tokens.
    """

    alone = True
    reference = "denoise"

    def canvas_length(self, request: Request, config: ModelConfig) -> int:
        """Positions that the canvas has, the prompt's included; at most the context."""
        raise NotImplementedError

    def decode(self, request: Request, canvas: Canvas) -> Passes:
        """Yields passages and is sent the logits of the rows that they want, until the canvas is full."""
        raise NotImplementedError

    def headroom(self, request: Request) -> int:
        """Nothing beyond the canvas, which is set aside as it is."""
        return 0

    def propose(self, request: Request, budget: int) -> Draft:
        """Nothing: a canvas is not drafted token by token."""
        return Draft()
