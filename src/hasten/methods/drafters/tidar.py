"""TiDAR: the model verifies its last draft autoregressively and drafts the next block by diffusion, in one pass.

"TiDAR: Think in Diffusion, Talk in Autoregression" (2511.08923). Behind every node of the draft, and behind the root,
stand as many masks as a block has: what they predict is the next draft for the case that verification accepts just so
far. A mask predicts its own position; the first of each group stands where verification's own token comes, which
replaces it. So a step of a draft of B - 1 nodes computes B + B * B rows and gives 1 to B tokens. `hasten train tidar`
makes such a model.

Exactness: lossless against plain (autoregressive) decoding of the same weights, the paper's trust parameter beta = 1:
masks are seen by nothing, verification is the engine's own. Drafts are the likeliest tokens, or drawn with the noise
that verification draws with. State per request: the next draft.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.engine import Draft, Drafter, Observation, Probe, Request, Target, register
from hasten.engine.sampling.sampler import likeliest
from hasten.errors import UserError
from hasten.methods.diffusion.causal_context import require_causal_context


@dataclass(frozen=True)
class TidarParameters:
    """Tokens per step at most, the model's block length if 0; smaller blocks cost fewer rows.

    Raises:
        UserError: out of range.
    """

    block: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.block <= 32:
            raise UserError("tidar: block must be between 0 (the model's own) and 32")


@register(
    "tidar",
    command="hasten bench --model tiny-tidar --methods tidar",
    family="drafters",
    exactness="lossless",
    paper="2511.08923",
    title="TiDAR: masks draft the next block as this is verified",
    parameters=TidarParameters,
    needs_training=True,
)
class Tidar(Drafter):
    """Keeps, per request, the blocks that masks behind each node of the last draft predicted: one is the next draft."""

    # Its first draft has no tokens yet, only masks: a composition would ask the next drafter instead.
    alone = True

    def __init__(self, target: Target, parameters: TidarParameters) -> None:
        diffusion = require_causal_context(target, "tidar", "same")
        self.block = parameters.block or diffusion.block or 1
        if diffusion.block is not None and self.block > diffusion.block:
            raise UserError(f"tidar: block must be at most {diffusion.block}, which the model was trained with")
        self.masks, self.context = [diffusion.mask_id] * self.block, target.model.config.max_positions
        self._next: dict[int, list[int]] = {}

    def propose(self, request: Request, budget: int) -> Draft:
        draft = Draft.chain(self._next.pop(request.id, [])[: min(budget, request.stopper.left - 1)])
        # The context ends so many positions behind the root; masks do, too.
        room = self.context - len(request.tokens)
        # A group's first mask stands where verification's own token comes: what it says is never read.
        draft.probes = [Probe(node, self.masks[: room - node - 1], silent=1) for node in range(-1, len(draft))]
        return draft

    def observe(self, request: Request, seen: Observation) -> None:
        if not seen.draft.probes:
            return
        sizes = [probe.heard for probe in seen.draft.probes]
        first, size = sum(sizes[: len(seen.path)]), sizes[len(seen.path)]
        logits = seen.probes[first : first + size]
        sampler, position = request.sampler, len(request.tokens)
        if sampler.grammar is not None or not len(logits):
            self._next[request.id] = likeliest(logits)
        else:
            positions = range(position, position + len(logits))
            self._next[request.id] = sampler.choose(logits, list(positions), [()] * len(logits))

    def end(self, request: Request) -> None:
        self._next.pop(request.id, None)
