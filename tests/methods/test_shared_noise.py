"""What a drafter believes of its draws under shared noise, against what happens."""

from __future__ import annotations

from math import log

import pytest
import torch

from hasten import SamplingParams
from hasten.engine.sampling.sampler import Distribution, Sampler
from hasten.methods.drafters.shared_noise import MOST, Belief, together

SIZE, DRAWS = 200, 400


def draws(temperature: float, sure: bool):
    """(q, probability where both draw alike, whether the target drew the same) of each of many draws."""
    sampler = Sampler(SamplingParams(temperature=temperature, seed=3), 0, [1], SIZE)
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(DRAWS, SIZE, generator=generator)
    if sure:
        # One token, with the drafter's probability of it; the drafter is right about how often.
        chosen = (logits / temperature).softmax(-1).multinomial(1, generator=generator)
        target = torch.full_like(logits, -50.0).scatter(1, chosen, 50.0)
    else:
        # As far apart as `together` supposes: by noise of the scale that the softmax stands for.
        target = logits - torch.rand(DRAWS, SIZE, generator=generator).log().neg().log()
    positions = list(range(DRAWS))
    mine = sampler.perturbed(Distribution(logits / temperature, None, SIZE), positions)
    theirs = sampler.perturbed(Distribution(target / temperature, None, SIZE), positions).argmax(-1)
    drawn = mine.argmax(-1, keepdim=True)
    alone = (logits / temperature).softmax(-1).gather(1, drawn)[:, 0].tolist()
    alike = together(mine, temperature).gather(1, drawn)[:, 0].tolist()
    return list(zip(alone, alike, (theirs == drawn[:, 0]).tolist(), strict=True))


def surprise(pairs) -> float:
    """Mean negative log-likelihood of what happened."""
    return sum(-log(max(p if right else 1 - p, 1e-6)) for p, right in pairs) / len(pairs)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("sure", [False, True])
def test_the_belief_finds_the_case_that_holds(temperature, sure):
    belief, believed = Belief(), []
    cases = draws(temperature, sure)
    for alone, alike, right in cases:
        believed.append((belief.of(alone, alike), right))
        belief.learn(alone, alike, right)
    by_q = [(alone, right) for alone, _, right in cases]
    alike = [(probability, right) for _, probability, right in cases]
    assert surprise(believed) < min(surprise(by_q), surprise(alike)) + 0.06
    assert surprise(by_q if not sure else alike) > surprise(believed) + 0.05
    rate = sum(right for *_, right in cases) / DRAWS
    assert sum(p for p, _ in believed) / DRAWS == pytest.approx(rate, abs=0.12)


def test_without_noise_both_cases_are_one():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    torch.testing.assert_close(together(logits / 1e-3, 1e-3), logits.softmax(-1))


def test_odds_are_bounded_and_turn():
    belief = Belief()
    for _ in range(100):
        belief.learn(0.0, 1.0, True)
    assert belief.odds == -MOST and belief.of(0.0, 1.0) > 0.9
    for _ in range(4):
        belief.learn(0.1, 0.9, False)
    assert belief.of(0.1, 0.9) < 0.5
