"""Losses against loops over positions, and dParallel's entropy."""

from __future__ import annotations

import math

import pytest
import torch

from hasten.train.diffusion.losses import certainty, mean_cross_entropy, weighted_cross_entropy


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2


LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1])


def surprise(row: list[float], label: int) -> float:
    return math.log(sum(math.exp(value) for value in row)) - row[label]


def test_cross_entropies_are_sums_over_positions(logits: torch.Tensor):
    each = [surprise(row, label) for row, label in zip(logits.tolist(), LABELS.tolist(), strict=True)]
    weights = torch.linspace(1, 4, 7, dtype=torch.float64)
    weighted = sum(weight * value for weight, value in zip(weights.tolist(), each, strict=True)) / 11
    assert weighted_cross_entropy(logits, LABELS, weights, 11).item() == pytest.approx(weighted, abs=1e-6)
    assert mean_cross_entropy(logits, LABELS).item() == pytest.approx(sum(each) / 7, abs=1e-6)
    assert mean_cross_entropy(logits[:0], LABELS[:0]).item() == 0


def test_certainty_without_entropy_is_cross_entropy(logits: torch.Tensor):
    assert torch.equal(certainty(logits, LABELS, beta=0), mean_cross_entropy(logits, LABELS))


def test_certainty_adds_the_entropy_of_right_predictions(logits: torch.Tensor):
    labels = LABELS.clone()
    labels[:3] = logits[:3].argmax(1)
    entropies = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        if label == max(range(5), key=row.__getitem__):
            total = sum(math.exp(value / 0.5) for value in row)
            entropies.append(-sum((p := math.exp(value / 0.5) / total) * math.log(p) for value in row))
    assert 3 <= len(entropies) < 7
    expected = mean_cross_entropy(logits, labels).item() + 2 * sum(entropies) / len(entropies)
    assert certainty(logits, labels, beta=2).item() == pytest.approx(expected, abs=1e-6)


def test_wrong_predictions_get_no_gradient_from_the_entropy(logits: torch.Tensor):
    labels = LABELS.clone()
    labels[:3] = logits[:3].argmax(1)
    logits.requires_grad_()
    entropy = certainty(logits, labels, beta=1) - mean_cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(entropy, logits)
    right = logits.argmax(1) == labels
    assert gradient[~right].abs().max() < 1e-12
    assert (gradient[right].abs().max(1).values > 1e-6).all()
    # No prediction is right: the loss is still finite.
    wrong = certainty(logits, (logits.argmax(1) + 1) % 5, beta=1)
    assert torch.isfinite(torch.autograd.grad(wrong, logits)[0]).all()
