"""DySpec: a draft tree grown at run time, always by the sample that verification is likeliest to reach.

"DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure", 2024, arXiv 2410.11744. Exactness: lossless.

The small model's own distribution D tells where nodes are worth their place. Let V(u) be the product of D along the
path to node u. Its next child is a *sample* without replacement, reached with probability v = V(u) * (1 - D of the
children drawn before), which is known before it is drawn. v falls along every path and every list of siblings, so
taking the largest pending sample first gives the tree of the largest sum of v (algorithm 1).

- `construction=fixed` is that tree. The small model is asked for all nodes together that may still be expanded, and
  only when the largest pending sample needs it: the same tree as one call per node, in far fewer calls.
- `construction=threshold` (algorithm 2) takes every sample above a threshold, level by level: one call for the root and
  one per level, for the whole batch. The printed comparison is the wrong way round; the text and this code agree.

Verification (algorithm 3) is the engine's rule for children drawn without replacement (`acceptance="max"`), with
uniform coins, not normal ones as printed. Whether a sample is taken never depends on its value, and only samples that
were not drawn are dropped at a limit; so the shape, which depends on all that was drawn before, biases nothing.

With `acceptance="match"` children come in the order that the target's own noise gives the request's distribution. So
the next child is known, and its v is its own probability (`shared_noise`), not all that is left: an improbable token
that leads by far needs no siblings. For greedy requests the likeliest come first, where the paper draws at random,
which can only leave better tokens out.

Choosing the threshold by a cost curve, and calibrating D against measured acceptance, are left to planners.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, nsmallest

from torch import Tensor

from hasten.engine import ROOT, Request, Target, register
from hasten.engine.drafting.draft import MAX_DRAFT
from hasten.engine.sampling.sampler import Distribution
from hasten.errors import UserError
from hasten.methods.drafters.small_model import Growth, SmallModelDrafter, load_small_model
from hasten.model import Model


@dataclass(frozen=True)
class DySpecParameters:
    """Parameters of the tree.

    Attributes:
        model: folder or hub id of the small model; `auto` looks for a sibling folder named like the target's with
            `-draft`.
        nodes: at most so many per draft.
        construction: `threshold` or `fixed`.
        threshold: samples are taken down to this probability; 0 is 1 / (nodes + 1). Only for `threshold`.
        draft_temperature: of D, for greedy requests and where children are drawn by the drafter's own coins. Shared
            noise (`match`) agrees most at the request's own temperature, and is given that.
        max_depth: levels at most. The authors set no limit and saw less than 10 at 64 nodes.
        dtype: of the small model's weights.

    Raises:
        UserError: out of range.
    """

    model: str = "auto"
    nodes: int = 64
    construction: str = "threshold"
    threshold: float = 0.0
    draft_temperature: float = 0.6
    max_depth: int = 16
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= MAX_DRAFT:
            raise UserError(f"dyspec: nodes must be between 1 and {MAX_DRAFT}")
        if self.construction not in ("threshold", "fixed"):
            raise UserError(f"dyspec: construction must be threshold or fixed, not {self.construction!r}")
        if not 0 <= self.threshold < 1:
            raise UserError("dyspec: threshold must be at least 0 (1 / (nodes + 1)) and below 1")
        if not 0.1 <= self.draft_temperature <= 2:
            raise UserError("dyspec: draft_temperature must be between 0.1 and 2")
        if not 1 <= self.max_depth <= 32:
            raise UserError("dyspec: max_depth must be between 1 and 32")


@register(
    "dyspec",
    family="drafters",
    exactness="lossless",
    paper="2410.11744",
    title="DySpec: a tree grown where the small model is sure",
    parameters=DySpecParameters,
)
class DySpec(SmallModelDrafter):
    """One heap of pending samples per request; one forward of the small model per round for all requests."""

    def __init__(self, target: Target, parameters: DySpecParameters) -> None:
        super().__init__(self._load(target, parameters), target.end_ids)
        self.parameters = parameters

    def _load(self, target: Target, parameters: DySpecParameters) -> Model:
        return load_small_model("dyspec", target, parameters.model, parameters.dtype)

    def widest(self, nodes: int) -> int:
        # A round asks for nodes that are there already, and for no more of them than may still be added.
        return max(1, min(nodes, self.parameters.nodes) // 2)

    def start(self, request: Request, budget: int) -> Growth:
        return _Tree(self, request, budget)

    def distribution(self, request: Request, logits: Tensor, paths: Sequence[Sequence[int]]) -> Distribution:
        """At the draft temperature; filtered at the request's own, since what the target cannot say is no use."""
        distribution = super().distribution(request, logits, paths)
        params = request.params
        if params.greedy or params.acceptance != "match":
            distribution.scores = distribution.scores * ((params.temperature or 1) / self.parameters.draft_temperature)
        return distribution


class _Tree(Growth):
    """Samples wait in a heap: (-v, node), "one more child of the node". `_next` are those that the noise has named."""

    def __init__(self, drafter: DySpec, request: Request, budget: int) -> None:
        parameters = drafter.parameters
        super().__init__(drafter, request, min(budget, parameters.nodes), parameters.max_depth)
        self.level_wise = parameters.construction == "threshold"
        self.threshold = (parameters.threshold or 1 / (parameters.nodes + 1)) if self.level_wise else 0.0
        self._supply: dict[int, Iterator[tuple[int, float]]] = {}
        self._next: dict[int, tuple[int, float]] = {}
        self._named = not self.sampled and not request.params.greedy
        self._heap = [(-1.0, ROOT)]

    def grow(self, logits: Tensor) -> None:
        left = self.nodes - len(self.draft)
        self._supply.update(zip(self.frontier, self.children(logits, left), strict=True))
        if self._named:
            waiting, self._heap = self._heap, []
            for value, node in waiting:
                if node in self._supply and node not in self._next:
                    self._push(node)
                else:
                    heappush(self._heap, (value, node))
        waiting = self._take()
        # What is not among the best so many pending samples comes too late, whatever the others lead to.
        best = nsmallest(self.nodes - len(self.draft), waiting + self._heap)
        self.frontier = [node for value, node in best if node not in self._supply and -value > self.threshold]
        self._heap += waiting
        heapify(self._heap)

    def _take(self) -> list[tuple[float, int]]:
        """Take samples, largest first, while the largest can be drawn; returns those set aside for the next level."""
        waiting: list[tuple[float, int]] = []
        while self._heap and len(self.draft) < self.nodes and -self._heap[0][0] > self.threshold:
            node = self._heap[0][1]
            if node not in self._supply:
                if not self.level_wise:
                    break
                waiting.append(heappop(self._heap))
                continue
            heappop(self._heap)
            drawn = self._next.pop(node) if self._named else next(self._supply[node], None)
            if drawn is None:
                continue
            child = self.add(node, *drawn)
            self._push(node)
            if len(self.paths[child]) < self.depth and drawn[0] not in self.closed:
                self._push(child)
        return waiting

    def _push(self, node: int) -> None:
        value = self.values[node] * self.rest[node]
        if self._named and node in self._supply:
            named = next(self._supply[node], None)
            if named is None:
                return
            self._next[node], value = named, self.values[node] * named[1]
        heappush(self._heap, (-value, node))
