"""All courses that a procedure with coins can take, each with its probability: laws without samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import pytest
from laws import KEPT, Propose
from torch import Tensor

from hasten.engine.drafting import verification
from hasten.engine.drafting.verification import Verdict
from hasten.engine.sampling import sampler
from hasten.engine.sampling.noise import Uniforms

Result = TypeVar("Result")


class Coins(Uniforms):
    """Coins that come up as a course has it; `chance` is the probability of it so far."""

    def __init__(self, course: list[int], widths: list[int]) -> None:
        self._course, self._widths, self._taken = course, widths, 0
        self.chance = 1.0

    def draw(self) -> float:
        return Coin(self)  # type: ignore[return-value]

    def choose(self, chances: Sequence[float]) -> int:
        """One of several, by these probabilities; impossible ones are not among the courses."""
        possible = [number for number, chance in enumerate(chances) if chance > 0]
        if self._taken == len(self._course):
            self._course.append(0)
            self._widths.append(len(possible))
        chosen = possible[self._course[self._taken]]
        self._taken += 1
        self.chance *= chances[chosen]
        return chosen


class Coin:
    """A uniform number that is not known until it is compared."""

    def __init__(self, coins: Coins, scale: float = 1.0) -> None:
        self.coins, self.scale = coins, scale

    def __mul__(self, factor: float) -> Coin:
        return Coin(self.coins, self.scale * factor)

    def __lt__(self, bound: float) -> bool:
        below = float(bound > 0) if self.scale == 0 else min(1.0, max(0.0, bound / self.scale))
        return self.coins.choose([below, 1 - below]) == 0


def draw(probabilities: Tensor, coin: Coin) -> int:
    """As `hasten.engine.sampling.sampler.draw`."""
    return coin.coins.choose((probabilities / probabilities.sum()).tolist())


def courses(run: Callable[[Coins], Result]) -> Iterator[tuple[float, Result]]:
    """Probability and result of every course."""
    course: list[int] = []
    widths: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (sampler, verification):
            patch.setattr(module, "draw", draw)
        while True:
            coins = Coins(course, widths)
            result = run(coins)
            yield coins.chance, result
            while course and course[-1] == widths[-1] - 1:
                course.pop()
                widths.pop()
            if not course:
                return
            course[-1] += 1


Verify = Callable[[verification.Draft, Callable[[int], Tensor], Uniforms], Verdict]


def law_of_a_step(table: Tensor, propose: Propose, verify: Verify, context: tuple[int, int]) -> np.ndarray:
    """The law of `KEPT` tokens, [size] * KEPT, where one step drafts and verifies and the target's own law goes on."""

    def step(coins: Coins) -> tuple[int, ...]:
        draft = propose(context, coins)

        def target(node: int) -> Tensor:
            whole = context + tuple(draft.tokens[above] for above in draft.path(node))
            return table[whole[-2], whole[-1]]

        verdict = verify(draft, target, coins)
        return (*(draft.tokens[node] for node in verdict.path), verdict.token)

    p = table.numpy()
    law = np.zeros(p.shape[:1] * KEPT)
    for chance, tokens in courses(step):
        kept = tokens[:KEPT]
        law[kept] += chance * _following(p, (*context, *kept)[-2:], KEPT - len(kept))
    return law


def _following(p: np.ndarray, pair: Sequence[int], count: int) -> np.ndarray:
    """Law of the next `count` tokens, [size] * count."""
    if count == 0:
        return np.array(1.0)
    first = p[tuple(pair)]
    return np.stack([chance * _following(p, (pair[1], token), count - 1) for token, chance in enumerate(first)])
