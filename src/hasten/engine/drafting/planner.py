"""The planner: how much of a draft to verify, from the measured cost of rows and the acceptance seen so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from hasten.engine.drafting.cost import VerifyCost
from hasten.engine.drafting.draft import ROOT, Draft

BINS = 8
"""Of estimates, per halving."""
SMALLEST = 2.0**-10
"""Estimates below this are taken for it."""
SUREST = 0.99
"""Probability of a node, at most."""
PRIOR = 1.0
"""Accepted nodes that the drafter's own estimate is worth, per bin."""
MEMORY = 100.0
"""Accepted or promised nodes of a bin after which old ones fade."""


@dataclass
class Calibration:
    """How far a drafter's estimates hold: a measured factor for every bin of estimates.

    A draft without estimates is judged by the depth of its nodes, each level a bin of its own that promises half of the
    one above.
    """

    accepted: dict[int, float] = field(default_factory=dict)
    promised: dict[int, float] = field(default_factory=dict)

    def probabilities(self, draft: Draft) -> list[float]:
        """Probability that each node is accepted; never above its parent's."""
        result: list[float] = []
        for (bin_, promise), parent in zip(_promises(draft), draft.parents, strict=True):
            factor = (PRIOR + self.accepted.get(bin_, 0.0)) / (PRIOR + self.promised.get(bin_, 0.0))
            result.append(min(promise * factor, SUREST if parent == ROOT else result[parent]))
        return result

    def observe(self, draft: Draft, verdicts: Sequence[bool | None]) -> None:
        """Count nodes that were right or wrong (`Draft.judged`), whether they were verified or not."""
        for right, (bin_, promise) in zip(verdicts, _promises(draft), strict=True):
            if right is None:
                continue
            accepted = self.accepted.get(bin_, 0.0) + right
            promised = self.promised.get(bin_, 0.0) + promise
            fade = 0.5 if max(accepted, promised) > MEMORY else 1.0
            self.accepted[bin_], self.promised[bin_] = fade * accepted, fade * promised


def _promises(draft: Draft) -> list[tuple[int, float]]:
    """Bin and promised probability of each node."""
    if draft.estimates:
        promises = [min(max(estimate, SMALLEST), 1.0) for estimate in draft.estimates]
        return [(round(BINS * math.log2(promise)), promise) for promise in promises]
    return [(depth, 0.5**depth) for depth in draft.depths()]


@dataclass(frozen=True)
class Plan:
    """`nodes` of each request's draft that are worth verifying, and the tokens per second to expect then."""

    nodes: list[list[int]]
    rate: float


class Planner:
    """Chooses drafts' sizes so that a step's expected tokens per second are highest; no nodes at all is one choice.

    With tokens E(n) expected from the n likeliest nodes of the batch and T(rows) seconds for a step, it maximises
    (batch + E(n)) / T(batch + n). Nodes enter in the order of their probabilities, so that every prefix is the best
    choice of its size, and ancestors come before their descendants.
    """

    def __init__(self, cost: VerifyCost) -> None:
        self.cost = cost
        self.pace = 1.0
        """What steps take now, over what the curve says: the machine may be busier than when it was measured."""

    def seconds(self, rows: float, context: float, batch: int = 1) -> float:
        """Of a step's forward pass."""
        return self.pace * self.cost.of(rows, context, batch)

    def rate(self, tokens: float, rows: float, context: float, batch: int = 1, spent: float = 0.0) -> float:
        """Tokens per second of a step of `rows` rows that gives `tokens`, with `spent` seconds of drafting."""
        return tokens / (self.seconds(rows, context, batch) + spent)

    def plan(
        self, probabilities: Sequence[Sequence[float]], context: float, spent: float = 0.0, others: int = 0
    ) -> Plan:
        """Which nodes of each draft to keep.

        Args:
            probabilities: per request, of its draft's nodes; none above its parent's.
            context: mean cached tokens.
            spent: seconds that drafting took.
            others: further requests of the batch, without drafts.
        """
        batch = len(probabilities) + others
        order = sorted((-p, index, node) for index, each in enumerate(probabilities) for node, p in enumerate(each))
        tokens, rows = float(batch), batch
        best_rate, best_size = self.rate(tokens, rows, context, batch, spent), 0
        for negative, _, _ in order:
            tokens, rows = tokens - negative, rows + 1
            rate = self.rate(tokens, rows, context, batch, spent)
            if rate > best_rate:
                best_rate, best_size = rate, rows - batch
        nodes: list[list[int]] = [[] for _ in probabilities]
        for _, index, node in order[:best_size]:
            nodes[index].append(node)
        return Plan([sorted(each) for each in nodes], best_rate)
