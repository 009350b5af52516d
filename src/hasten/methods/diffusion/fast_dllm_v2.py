"""Fast-dLLM v2: block diffusion adapted from an autoregressive model, decoded in parts of a block.

"Fast-dLLM v2: Efficient Block-Diffusion LLM" (2509.26328), section 3.3. Finished blocks are in the cache, exactly.
Inside a block, parts of `part` tokens are filled from left to right: every token above `threshold` (strictly), and
always the surest. With `block_cache` a look computes only the open part, over keys and values of the rest of the block
as they were at the last look at all of it; these are made anew when a part is begun whose first token is not decided.
`hasten train fast-dllm-v2` adapts a model. The first token of a block comes from the pass that finishes the block
before, and is sampled like any other (the release takes the likeliest). Exactness: lossy against one token per pass;
the cache of blocks is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.engine import BlockWindow, Canvas, Knob, Request, Target, View, Window, register
from hasten.errors import UserError, require
from hasten.methods.diffusion.block_denoiser import BlockDenoiser, BlockParameters


@dataclass(frozen=True)
class FastDllmV2Parameters(BlockParameters):
    """`threshold` of 1 commits one token per pass.

    Raises:
        UserError: out of range.
    """

    part: int = 8
    threshold: float = 0.9
    block_cache: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(((self.threshold >= 0, "threshold must not be negative"),), "fast-dllm-v2")


@register(
    "fast-dllm-v2",
    role="denoiser",
    family="diffusion",
    exactness="lossy",
    paper="2509.26328",
    title="Fast-dLLM v2: parts of blocks, with two levels of cache",
    parameters=FastDllmV2Parameters,
    knob=Knob("threshold", (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)),
)
class FastDllmV2(BlockDenoiser[FastDllmV2Parameters]):
    """Commits above the threshold, part by part of a block, with the rest of the block cached as it was.

    Raises:
        UserError: a model whose positions all see each other: it has no blocks that are finished.
    """

    def __init__(self, target: Target, parameters: FastDllmV2Parameters) -> None:
        super().__init__(target, parameters)
        if self.config is not None and self.config.attention == "full":
            raise UserError(
                "fast-dllm-v2 needs a model that finishes one block before the next (`hasten train nbdiff`)"
            )

    def window(self, request: Request, canvas: Canvas) -> Window:
        assert self.config is not None
        return BlockWindow(canvas, request.sequence, self.config, parts=self.parameters.block_cache)

    def update(self, request: Request, view: View) -> None:
        sure = view.open & (view.confidence > self.parameters.threshold)
        view.commit(sure | view.best(view.confidence))
