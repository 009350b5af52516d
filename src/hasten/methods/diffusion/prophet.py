"""Prophet: stop when the answer has converged, and fill what is left at once.

"Diffusion Language Models Know the Answer Before Decoding" (2508.19982). Before every commit the mean gap between the
two largest logits over an answer region is compared with a threshold that falls with progress (steps over the budget of
one step per position); once it is reached, every mask of the canvas becomes its current prediction. Thresholds are in
units of raw logits, so that they depend on the model.

The released rule needs to know where the answer is: behind a `suffix` that is written into the canvas beforehand.
Without one, all masked positions before the first predicted end of text count, by a low quantile of their gaps: what is
behind the end is certain from the first step on and would drown the rest. Until the answer has converged, one token is
committed per pass. With a dual cache most passes see the open block alone: one that does not see the whole region (the
`answer` positions behind a suffix, or the canvas up to its end) decides nothing; one that does fills what it sees, and
the pass that opens the next block fills the rest. For models that finish one block before the next, the canvas is the
open block. Exactness: lossy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hasten.engine import Canvas, Knob, Passes, Request, Target, View, register
from hasten.errors import UserError, require
from hasten.methods.diffusion.block_denoiser import BlockDenoiser, BlockParameters
from hasten.model import ModelConfig

MIDDLE, LATE = 0.33, 0.67
"""Progress at which the next threshold holds."""


@dataclass(frozen=True)
class ProphetParameters(BlockParameters):
    """Thresholds `early`, `middle`, `late` of the gap, and where it is looked at.

    Attributes:
        suffix: text that is written at `offset` new positions from the prompt before decoding begins (the paper's
            constraint, such as "The answer is"). The gap is then the mean over the `answer` positions behind it.
        quantile: without a suffix, of the gaps over masked positions up to the first that is predicted to end the text.

    Raises:
        UserError: out of range.
    """

    early: float = 7.5
    middle: float = 5.0
    late: float = 2.5
    answer: int = 5
    quantile: float = 0.1
    suffix: str = ""
    offset: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = (
            (self.answer >= 1, "answer must be at least 1"),
            (0 <= self.quantile <= 1, "quantile must be between 0 and 1"),
            (self.offset >= 0, "offset must not be negative"),
        )
        require(checks, "prophet")


@register(
    "prophet",
    role="denoiser",
    family="diffusion",
    exactness="lossy",
    paper="2508.19982",
    title="Prophet: fills all at once when the answer has settled",
    parameters=ProphetParameters,
    knob=Knob("scale", (4.0, 2.0, 1.0, 0.5, 0.25), scaled=("early", "middle", "late")),
)
class Prophet(BlockDenoiser[ProphetParameters]):
    """Commits the surest position after each look, and all at once when the gap over the answer is wide enough.

    Raises:
        UserError: a suffix without a tokenizer, or one that does not fit.
    """

    beyond = True

    def __init__(self, target: Target, parameters: ProphetParameters) -> None:
        super().__init__(target, parameters)
        self.suffix: list[int] = []
        if parameters.suffix:
            if target.tokenizer is None:
                raise UserError("prophet: a suffix needs a tokenizer, and this model has none")
            self.suffix = target.tokenizer.encode(parameters.suffix, add_special_tokens=False)

    def canvas_length(self, request: Request, config: ModelConfig) -> int:
        length = super().canvas_length(request, config)
        if self.suffix and request.prompt_length + self.parameters.offset + len(self.suffix) >= length:
            raise UserError("prophet: the suffix does not fit into the canvas; lower offset or allow more tokens")
        return length

    def decode(self, request: Request, canvas: Canvas) -> Passes:
        if self.suffix:
            first = canvas.prompt_length + self.parameters.offset
            canvas.commit(torch.arange(first, first + len(self.suffix)), torch.tensor(self.suffix))
        yield from super().decode(request, canvas)

    def update(self, request: Request, view: View) -> None:
        gap = self._gap(view)
        progress = view.canvas.steps / (view.canvas.length - view.canvas.prompt_length)
        own = self.parameters
        threshold = own.early if progress < MIDDLE else own.middle if progress < LATE else own.late
        view.commit(view.masked if gap is not None and gap >= threshold else view.best(view.confidence))

    def _gap(self, view: View) -> float | None:
        """Of the answer region; None where this pass does not see all of it."""
        rows = view.masked.clone()
        if self.suffix:
            first = view.canvas.prompt_length + self.parameters.offset + len(self.suffix) - view.start
            last = min(first + self.parameters.answer, view.canvas.length - view.start)
            if last > len(rows):
                return None
            # Decided positions of the region count; so do those before the view, which are sure by now.
            return float(view.gaps[max(first, 0) : last].mean()) if last > 0 else float("inf")
        full = self.config is not None and self.config.attention == "full"
        if full and view.start + len(rows) < view.canvas.length:
            return None
        ends = (view.ends & view.masked).nonzero()
        if len(ends) and int(ends[0]) > int(view.masked.nonzero()[0]):
            rows[int(ends[0]) :] = False
        return float(torch.quantile(view.gaps[rows], self.parameters.quantile))
