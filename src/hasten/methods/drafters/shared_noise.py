"""How surely a target draws what its drafter drew with the same noise (`acceptance="match"`).

Rejection accepts a token as often as the drafter's probability allows; shared noise does not. Both sides take the
largest of score plus noise, so an improbable token is accepted, too, if its lead over the others is larger than what
their scores differ by. There are two cases, and `Belief` learns in each request which one holds:

- *The target is sure* where the drafter is not. Then the noise decides nothing, and the target's token is any one with
  the drafter's probability of it: q.
- *It draws as the drafter does.* Then scores with noise are to the draw what logits are to a greedy choice: the softmax
  of logits + temperature * noise says how likely each token is to be the target's. This is q itself at temperature 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log
from typing import TypeVar

from torch import Tensor

START, MOST = 3.0, 5.0
"""Log odds of the first case at the start, and their bound either way: a text may change."""
LEAST = 1e-4
"""Probabilities below this are taken for it: no single token decides."""

Share = TypeVar("Share", float, Tensor)


def together(perturbed: Tensor, temperature: float) -> Tensor:
    """Probability of each token where both draw alike.

    Args:
        perturbed: the drafter's scores plus noise, float32 [rows, tokens] (`Sampler.perturbed`).
        temperature: of the scores.
    """
    return (perturbed * temperature).softmax(-1)


@dataclass
class Belief:
    """Of one request: the log odds that its target is sure."""

    odds: float = START

    def of(self, alone: Share, together: Share) -> Share:
        """Probability that a drafted token is the target's.

        Args:
            alone: if the target is sure: q of the token.
            together: if it draws as the drafter does.
        """
        return together + (alone - together) / (1 + exp(-self.odds))

    def learn(self, alone: float, together: float, right: bool) -> None:
        """The target drew: the odds move by how far each case had foreseen this."""
        if not right:
            alone, together = 1 - alone, 1 - together
        self.odds += log(max(alone, LEAST) / max(together, LEAST))
        self.odds = min(max(self.odds, -MOST), MOST)
