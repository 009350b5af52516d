"""What denoisers share that go from block to block: look at the open block, commit some of it, until it is full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from hasten.engine import BlockWindow, Canvas, Denoiser, FullWindow, Passes, Request, Target, View, Window
from hasten.errors import require
from hasten.model import ModelConfig


@dataclass(frozen=True)
class BlockParameters:
    """Where a canvas ends and what a look at it computes.

    Attributes:
        block: positions per block, for models whose positions all see each other; others have their own.
        cache: for the same models, what a pass may leave out (Fast-dLLM, 2505.22618, section 3.2): `none`; `prefix`:
            what is before the block; `dual`: what is behind it, too. Both are lossy.
        refresh: with a cache, a pass over the whole canvas every so many looks; 0 for when a block is opened only.
        canvas: new positions, for the same models, where the request does not say how many tokens it wants.
        part: positions of a block that are filled before the next ones; 0 for all together.

    Raises:
        UserError: out of range.
    """

    least_block: ClassVar[int] = 1

    block: int = 32
    cache: str = "none"
    refresh: int = 0
    canvas: int = 128
    part: int = 0

    def __post_init__(self) -> None:
        require(
            (
                (self.block >= self.least_block, f"block must be at least {self.least_block}"),
                (self.cache in ("none", "prefix", "dual"), f"cache must be none, prefix or dual, not {self.cache!r}"),
                (self.refresh >= 0 and self.part >= 0, "refresh and part must not be negative"),
                (self.canvas >= 1, "canvas must be at least 1"),
            ),
            "denoising",
        )


P = TypeVar("P", bound=BlockParameters)


class BlockDenoiser(Denoiser, Generic[P]):
    """Fills blocks in order. A method says in `update` what to commit after each look."""

    beyond = False
    """Whether views also hold what is behind the open part, where a pass computes it anyway."""

    def __init__(self, target: Target, parameters: P) -> None:
        self.parameters, self.config = parameters, target.model.config.diffusion

    def canvas_length(self, request: Request, config: ModelConfig) -> int:
        assert self.config is not None
        start, budget = request.prompt_length, request.stopper.left
        if self.config.attention == "full":
            given = request.params.max_tokens is not None
            return start + (budget if given else min(budget, self.parameters.canvas))
        # The last block is whole, as the model knows it, unless the context ends.
        size = self.config.block or 1
        base = start if self.config.attention == "context-causal" else 0
        return min(base - (base - start - budget) // size * size, config.max_positions)

    def window(self, request: Request, canvas: Canvas) -> Window:
        """How the request's canvas is looked at."""
        assert self.config is not None
        own = self.parameters
        if self.config.attention == "full":
            return FullWindow(canvas, request.sequence, self.config, own.block, own.cache, own.refresh)
        return BlockWindow(canvas, request.sequence, self.config)

    def parts(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Start and end of the parts of a block that are filled one after the other."""
        size = self.parameters.part or stop - start
        return [(low, min(low + size, stop)) for low in range(start, stop, size)]

    def decode(self, request: Request, canvas: Canvas) -> Passes:
        window = self.window(request, canvas)
        for start, stop in window.blocks():
            yield from window.open(start, stop)
            for low, high in self.parts(start, stop):
                while canvas.masks(low, high):
                    (view,) = yield from window.look(low, high, beyond=self.beyond)
                    self.update(request, view)

    def update(self, request: Request, view: View) -> None:
        """Commit at least one of the view's open rows, or shorten or fill the canvas."""
        raise NotImplementedError
