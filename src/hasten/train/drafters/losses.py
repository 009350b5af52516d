"""What a drafter is told of the target's distribution.

A drafted token is accepted with probability sum min(p, q) = 1 - TVD(p, q), so the total variation distance is the loss
that counts. "Direct Alignment of Draft Model for Speculative Decoding with Chat-Fine-Tuned LLMs", 2024, arXiv
2403.00858, reads its gradient as a policy's, whose reward is 1 where the target wants a token more than the drafter
does, and takes the reward's advantage instead (TVD++).

Over the whole vocabulary the mean of the reward drops out, since the p-weighted gradients of log p add up to 0: there
TVD++ is TVD's gradient over the reward's deviation. The mean counts where tokens are drawn (`tvd++sampled`), and where
the outer weight is uniform (`tvd++uniform`, as one independent implementation has it).

The value of a surrogate (all but `ce` and `kl`) says nothing; its gradient is what is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]
"""Drafter's and target's logits [rows, words], the tokens that the target said [rows], and coins; a mean over rows."""

LEAST = 1e-5
"""Added to deviations."""


def cross_entropy(drafter: Tensor, target: Tensor, said: Tensor, generator: torch.Generator) -> Tensor:
    """On what was said alone: the baseline."""
    return F.cross_entropy(drafter, said)


def kullback_leibler(drafter: Tensor, target: Tensor, said: Tensor, generator: torch.Generator) -> Tensor:
    """KL(q || p)."""
    return F.kl_div(drafter.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)


def total_variation(drafter: Tensor, target: Tensor, said: Tensor, generator: torch.Generator) -> Tensor:
    """Surrogate whose gradient is that of 1/2 sum |p - q|."""
    p, log_p, reward = _rewarded(drafter, target)
    return -(p * reward * log_p).sum(-1).mean()


def advantage(drafter: Tensor, target: Tensor, said: Tensor, generator: torch.Generator) -> Tensor:
    """TVD++: the reward less its mean, over its deviation, both of all rows and words."""
    p, log_p, reward = _rewarded(drafter, target)
    return -(p * _standard(reward) * log_p).sum(-1).mean()


def sampled_advantage(drafter: Tensor, target: Tensor, said: Tensor, generator: torch.Generator) -> Tensor:
    """TVD++ of one token that the drafter draws in each row."""
    p, log_p, reward = _rewarded(drafter, target)
    drawn = torch.multinomial(p, 1, generator=generator)
    return -(_standard(reward.gather(-1, drawn)) * log_p.gather(-1, drawn)).mean()


def uniform_advantage(drafter: Tensor, target: Tensor, said: Tensor, generator: torch.Generator) -> Tensor:
    """TVD++ with mean and deviation of each row, and all words of one weight."""
    _, log_p, reward = _rewarded(drafter, target)
    mean, deviation = reward.mean(-1, keepdim=True), reward.std(-1, keepdim=True)
    return -((reward - mean) / (deviation + LEAST) * log_p).mean()


def _rewarded(drafter: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p (no gradient), log p, and 1 where q > p (no gradient)."""
    log_p = drafter.log_softmax(-1)
    p = log_p.detach().exp()
    return p, log_p, (target.detach().softmax(-1) > p).to(p.dtype)


def _standard(reward: Tensor) -> Tensor:
    return (reward - reward.mean()) / (reward.std(correction=0) + LEAST)


LOSSES: Mapping[str, Loss] = {
    "ce": cross_entropy,
    "kl": kullback_leibler,
    "tvd": total_variation,
    "tvd++": advantage,
    "tvd++sampled": sampled_advantage,
    "tvd++uniform": uniform_advantage,
}


def overlap(drafter: Tensor, target: Tensor) -> Tensor:
    """sum min(p, q) per row of probabilities [rows, words]: how often a drafted token is accepted."""
    return torch.minimum(drafter, target).sum(-1)
