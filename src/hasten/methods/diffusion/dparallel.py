"""dParallel's decoding: every token whose distribution has little entropy is committed at once.

"dParallel: Learnable Parallel Decoding for dLLMs" (2509.26488). The paper's gain comes from distillation, which makes a
model certain of many tokens in parallel: `hasten train dparallel` makes such a model, as a checkpoint of its own. On a
model that was not distilled the same rule is the control. Entropies are of the model's own distribution, in nats.
Exactness: lossy.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.engine import Knob, Request, View, register
from hasten.methods.diffusion.block_denoiser import BlockDenoiser, BlockParameters


@dataclass(frozen=True)
class DParallelParameters(BlockParameters):
    """Positions of at most this `entropy` (nats) are committed, and always the one of least; negative: that one
    only."""

    entropy: float = 0.5


@register(
    "dparallel",
    role="denoiser",
    family="diffusion",
    exactness="lossy",
    paper="2509.26488",
    title="dParallel: all tokens below an entropy at once",
    parameters=DParallelParameters,
    knob=Knob("entropy", (0.1, 0.3, 0.5, 0.8, 1.2, 1.6)),
)
class DParallel(BlockDenoiser[DParallelParameters]):
    """Commits every position whose prediction has little entropy; the surest one if none has."""

    def update(self, request: Request, view: View) -> None:
        view.commit(view.open & (view.entropy <= self.parameters.entropy) | view.best(-view.entropy))
