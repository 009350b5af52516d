"""Losses over masked positions, and the certainty-forcing loss of dParallel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, total: Tensor | int) -> Tensor:
    """Sum of weight times -log p(label) in nats, over `total`.

    Args:
        logits: [positions, vocabulary].
        labels: [positions] int64.
        weights: [positions]; LLaDA's is one over the share of positions that is hidden.
        total: what the sum is divided by.
    """
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / total


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log p(label) in nats; 0 of no positions. Shapes as in `weighted_cross_entropy`."""
    return F.cross_entropy(logits, labels, reduction="sum") / max(1, labels.numel())


def certainty(logits: Tensor, labels: Tensor, beta: float, temperature: float = 0.5) -> Tensor:
    """Cross-entropy plus `beta` times the entropy of what is predicted right already (dParallel, arXiv 2509.26488).

    Wrong predictions have no part in the entropy: they would become sure of themselves.

    Args:
        logits: [positions, vocabulary], of one view's hidden positions.
        labels: [positions] int64.
        beta: weight of the entropy.
        temperature: of the distribution whose entropy is taken.
    """
    correct = logits.argmax(-1) == labels
    log_p = torch.log_softmax(logits[correct] / temperature, -1)
    entropy = -(log_p.exp() * log_p).sum() / max(1, int(correct.sum()))
    return mean_cross_entropy(logits, labels) + beta * entropy
