"""Losses of aligned drafters: their gradients are those of the distances they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.train.drafters.losses import LEAST, LOSSES, overlap

ROWS, WORDS = 7, 50


@pytest.fixture
def logits() -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.Generator().manual_seed(3)
    drafter, target = (2 * torch.randn(ROWS, WORDS, generator=noise, dtype=torch.float64) for _ in range(2))
    return drafter.requires_grad_(), target, torch.randint(WORDS, (ROWS,), generator=noise)


def gradient(name: str, drafter: Tensor, target: Tensor, said: Tensor, seed: int = 0) -> Tensor:
    loss = LOSSES[name](drafter, target, said, torch.Generator().manual_seed(seed))
    return torch.autograd.grad(loss, drafter)[0]


def distance(drafter: Tensor, target: Tensor) -> Tensor:
    """Mean total variation distance, as it is defined."""
    return 0.5 * (drafter.softmax(-1) - target.softmax(-1)).abs().sum(-1).mean()


def test_tvd_is_the_gradient_of_the_distance(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    drafter, target, said = logits
    got, step, differences = gradient("tvd", drafter, target, said), 1e-6, torch.zeros_like(drafter)
    with torch.no_grad():
        for place in range(drafter.numel()):
            nudge = torch.zeros_like(drafter).view(-1)
            nudge[place] = step
            ahead, behind = (distance(drafter + sign * nudge.view_as(drafter), target) for sign in (1, -1))
            differences.view(-1)[place] = (ahead - behind) / (2 * step)
    assert (got - differences).norm() < 1e-6 * differences.norm()


def test_over_all_words_the_advantage_is_the_distances_gradient_over_the_deviation(
    logits: tuple[Tensor, Tensor, Tensor],
) -> None:
    drafter, target, said = logits
    deviation = (target.softmax(-1) > drafter.softmax(-1)).double().std(correction=0)
    expected = gradient("tvd", drafter, target, said) / (deviation + LEAST)
    torch.testing.assert_close(gradient("tvd++", drafter, target, said), expected, atol=1e-9, rtol=0)


def test_sampled_it_is_the_same_on_average(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    """Up to what mean and deviation of the drawn rewards are: the direction is that of all words."""
    drafter, target, said = logits
    drawn = torch.stack([gradient("tvd++sampled", drafter, target, said, seed) for seed in range(3000)]).mean(0)
    whole = gradient("tvd", drafter, target, said)
    assert torch.nn.functional.cosine_similarity(drawn.flatten(), whole.flatten(), dim=0) > 0.95
    assert torch.equal(*(gradient("tvd++sampled", drafter, target, said, 5) for _ in range(2)))


def test_the_uniform_reading_is_no_rescaled_distance(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    drafter, target, said = logits
    p, q = drafter.detach().softmax(-1), target.softmax(-1)
    reward = (q > p).double()
    advantage = (reward - reward.mean(-1, keepdim=True)) / (reward.std(-1, keepdim=True) + 1e-5)
    # d log p(x) / d z = 1[x] - p, each word weighing 1 / (rows * words).
    expected = -(advantage - advantage.sum(-1, keepdim=True) * p) / (ROWS * WORDS)
    torch.testing.assert_close(gradient("tvd++uniform", drafter, target, said), expected)
    whole = gradient("tvd", drafter, target, said).flatten()
    assert torch.nn.functional.cosine_similarity(expected.flatten(), whole, dim=0) < 0.95


def test_cross_entropy_and_kl(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    drafter, target, said = logits
    p, q = drafter.softmax(-1), target.softmax(-1)
    coins = torch.Generator()
    torch.testing.assert_close(LOSSES["ce"](*logits, coins), -p[torch.arange(ROWS), said].log().mean())
    torch.testing.assert_close(LOSSES["kl"](*logits, coins), (q * (q / p).log()).sum(-1).mean())


def test_what_is_accepted_is_what_the_distance_leaves(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    drafter, target, _ = logits
    accepted = overlap(drafter.softmax(-1), target.softmax(-1))
    assert accepted.shape == (ROWS,)
    torch.testing.assert_close(accepted.mean(), 1 - distance(drafter, target))
