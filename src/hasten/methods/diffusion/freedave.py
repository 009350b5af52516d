"""FreeDave: draft and verify with the model itself, exactly what one token per pass would give.

"Free Draft-and-Verification" (2510.00294). A pass ranks all masked positions, so the next states of static decoding can
be guessed from it: its best token, its two best, ... committed. One pass over all these hypotheses tells what static
decoding would do after each of them; as long as that is the next hypothesis, the guess was right. The prediction of the
last right one is where the next round starts, so that verifying costs no pass of its own, and there are never more
passes than without. Rows per pass grow by the number of hypotheses.

Exactness: lossless against `denoise` with one token per pass, the same blocks, parts and kind of cache; when sampling,
too, because the noise belongs to the position and not to the step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from torch import Tensor

from hasten.engine import Canvas, Hypothesis, Knob, Passes, Request, Target, View, register
from hasten.errors import require
from hasten.methods.diffusion.block_denoiser import BlockDenoiser, BlockParameters
from hasten.methods.diffusion.denoise import DenoiseParameters, scores


@dataclass(frozen=True)
class FreeDaveParameters(BlockParameters):
    """`drafts` hypotheses per pass; `order` as of `denoise`, without `random`.

    Raises:
        UserError: out of range.
    """

    drafts: int = 4
    order: str = "confidence"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = (
            (1 <= self.drafts <= 64, "drafts must be between 1 and 64"),
            (self.order in ("confidence", "margin", "entropy"), "order must be confidence, margin or entropy"),
            (self.refresh == 0, "refresh must be 0: a pass over the whole canvas cannot hold several hypotheses"),
        )
        require(checks, "freedave")


@register(
    "freedave",
    role="denoiser",
    family="diffusion",
    exactness="lossless",
    paper="2510.00294",
    title="FreeDave: guesses denoising's next steps, checks them",
    parameters=FreeDaveParameters,
    knob=Knob("drafts", (2, 4, 8)),
)
class FreeDave(BlockDenoiser[FreeDaveParameters]):
    """Has several next steps of static decoding looked at together, and keeps them as far as each leads to the next."""

    def __init__(self, target: Target, parameters: FreeDaveParameters) -> None:
        super().__init__(target, parameters)
        shared = {field.name: field.default for field in fields(DenoiseParameters)}
        chosen = {name: getattr(parameters, name, default) for name, default in shared.items()}
        settings = ",".join(f"{name}={value}" for name, value in chosen.items() if value != shared[name])
        self.reference = f"denoise:{settings}" if settings else "denoise"

    def decode(self, request: Request, canvas: Canvas) -> Passes:
        window = self.window(request, canvas)
        for start, stop in window.blocks():
            yield from window.open(start, stop)
            for low, high in self.parts(start, stop):
                if not canvas.masks(low, high):
                    continue
                (view,) = yield from window.look(low, high)
                state = Hypothesis(start, canvas.ids[start:stop].clone(), canvas.masked[start:stop].clone(), ())
                ranked = self._ranked(view)
                while left := canvas.masks(low, high):
                    counts = range(1, 1 + min(self.parameters.drafts, left))
                    drafts = [self._next(state, view, ranked[:count]) for count in counts]
                    # The first is what static decoding does; the others are guesses that go on from there.
                    drafts = [replace(draft, path=draft.path[1:]) for draft in drafts]
                    state = self._commit(canvas, state, drafts[0])
                    if left == 1:
                        break
                    # What has no mask left needs no look.
                    views = yield from window.look(low, high, drafts[: left - 1])
                    right, ranked = 0, self._ranked(views[0])
                    while right + 1 < len(drafts):
                        target = self._next(drafts[right], views[right], ranked[:1])
                        if not target.same(drafts[right + 1]):
                            break
                        right += 1
                        if right < len(views):
                            ranked = self._ranked(views[right])
                    request.statistics.proposed += len(drafts) - 1
                    request.statistics.accepted += right
                    if right < len(views):
                        view = views[right].decided()
                    state = self._commit(canvas, state, drafts[right])

    def _ranked(self, view: View) -> Tensor:
        """int64 [open rows]: in the order in which static decoding would commit them if it saw nothing new."""
        return view.ranking(scores(self.parameters.order, view))

    def _next(self, state: Hypothesis, view: View, rows: Tensor) -> Hypothesis:
        """A state with these rows of a view of it committed."""
        inside, ids, masked = rows + view.start - state.start, state.ids.clone(), state.masked.clone()
        ids[inside], masked[inside] = view.tokens[rows], False
        return Hypothesis(state.start, ids, masked, (*state.path, *view.tokens[rows].tolist()))

    def _commit(self, canvas: Canvas, state: Hypothesis, after: Hypothesis) -> Hypothesis:
        """Put into the canvas what a later state has more."""
        rows = (state.masked & ~after.masked).nonzero().squeeze(1)
        canvas.commit(state.start + rows, after.ids[rows])
        return replace(after, path=())
