"""Every temperature above 0 divides logits without overflow; the least ones choose as greedy decoding does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten import SamplingParams
from hasten.engine.sampling.sampler import Sampler

VOCABULARY = 40


def sampler(**settings) -> Sampler:
    return Sampler(SamplingParams(seed=3, **settings), 0, [1, 2], VOCABULARY)


def logits(seed: int, scale: float) -> torch.Tensor:
    return scale * torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(seed))


@given(
    st.floats(0, 100, exclude_min=True),
    st.integers(0, 99),
    st.sampled_from([1e-3, 1.0, 30.0]),
    st.sampled_from([{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}]),
    st.sampled_from([{}, {5: 1e38, 6: -1e38}, {5: 1e38, 6: 1e38}, {4: -float("inf")}]),
)
def test_weights_are_never_nan(temperature, seed, scale, filters, bias):
    drawing = sampler(temperature=temperature, logit_bias=bias, **filters)
    scores = drawing.distribution(logits(seed, scale), [[], [], []]).scores
    assert not scores.isnan().any() and not (scores == torch.inf).any()
    assert scores.softmax(-1).isfinite().all()


@pytest.mark.parametrize("temperature", [1e-9, 1e-38, 1e-45, 5e-324])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"logit_bias": {7: 1e38, 9: -1e38}}])
def test_hardly_any_temperature_is_greedy(temperature, filters):
    rows, paths, at = logits(0, 5.0), [[], [], []], [4, 5, 6]
    expected = sampler(**filters).choose(rows, at, paths)
    assert sampler(temperature=temperature, **filters).choose(rows, at, paths) == expected


@pytest.mark.parametrize("temperature", [1e-6, 0.3, 1.0, 100.0])
def test_other_temperatures_divide_as_they_are(temperature):
    rows = logits(0, 5.0)
    assert torch.equal(sampler(temperature=temperature).distribution(rows, [[]] * 3).scores, rows / temperature)


def test_a_row_without_any_token_left():
    nothing = torch.full((1, VOCABULARY), -torch.inf)
    assert not sampler(temperature=1e-9).distribution(nothing, [[]]).scores.isnan().any()
