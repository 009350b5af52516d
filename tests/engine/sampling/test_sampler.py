"""The processed distribution against transformers' processors and the formulas of the penalties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hasten import SamplingParams, UserError
from hasten.engine.sampling.sampler import Sampler, draw, likeliest, likeliest_of_model
from helpers import PeakBytes

SIZE = 200
PROMPT = [3, 5, 5, 7, 150]
LOGITS = 4 * torch.randn(30, SIZE, generator=torch.Generator().manual_seed(0))


def sampler(prompt=PROMPT, size=SIZE, **settings) -> Sampler:
    return Sampler(SamplingParams(**{"temperature": 1.0, "seed": 1, **settings}), 0, prompt, size)


def dense(distribution) -> torch.Tensor:
    return torch.stack([distribution.dense(row) for row in range(len(distribution.scores))])


CASES = [
    {"temperature": 0.7},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 17},
    {"top_k": 500},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6, "temperature": 0.5},
    {"temperature": 0.6, "top_k": 40, "top_p": 0.8},
    {"temperature": 1.4, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1.4, "top_k": 30, "min_p": 0.02},
    {"temperature": 0.9, "top_k": 60, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_as_transformers(settings):
    processors = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    expected = LOGITS.clone()
    ids = torch.tensor([PROMPT]).repeat(len(expected), 1)
    for name, processor in processors.items():
        if name in settings:
            expected = processor(settings[name])(ids, expected)
    expected = expected.double().softmax(-1)
    got = dense(sampler(**settings).distribution(LOGITS, [[]] * len(LOGITS)))
    assert torch.equal(got > 0, expected > 0)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_openai_penalties():
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, with c counted over the output only."""
    own = sampler(presence_penalty=0.5, frequency_penalty=0.25)
    own.committed([9, 9, 150])
    own.committed([9])
    expected = LOGITS.clone()
    expected[:, 9] -= 0.5 + 3 * 0.25
    expected[:, 150] -= 0.5 + 0.25
    torch.testing.assert_close(own.adjusted(LOGITS, [[]] * len(LOGITS)), expected)


def test_repetition_penalty_counts_prompt_and_output():
    own = sampler(repetition_penalty=2.0)
    own.committed([11])
    factor = torch.ones(SIZE)
    factor[[3, 5, 7, 150, 11]] = 2
    expected = torch.where(LOGITS > 0, LOGITS / factor, LOGITS * factor)
    torch.testing.assert_close(own.adjusted(LOGITS, [[]] * len(LOGITS)), expected)


def test_penalties_along_a_path():
    """A node's row is penalised for the tokens above it, as if they had been committed."""
    settings = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
    paths = [[], [4], [4, 4], [4, 8, 3], [150]]
    own = sampler(**settings)
    own.committed([8, 20])
    together = own.adjusted(LOGITS[:5], paths)
    for row, path in enumerate(paths):
        alone = sampler(**settings)
        alone.committed([8, 20, *path])
        assert torch.equal(alone.adjusted(LOGITS[row : row + 1], [[]])[0], together[row])


def test_logit_bias():
    own = sampler(logit_bias={4: 2.5, 199: -100.0})
    expected = LOGITS.clone()
    expected[:, 4] += 2.5
    expected[:, 199] -= 100
    assert torch.equal(own.adjusted(LOGITS, [[]] * len(LOGITS)), expected)
    assert own.choose(LOGITS, range(30), [[]] * 30) != sampler().choose(LOGITS, range(30), [[]] * 30)
    for token in (SIZE, -1):
        with pytest.raises(UserError, match=f"token id {token} is outside the vocabulary of {SIZE}"):
            sampler(logit_bias={token: 1.0})


def test_greedy_is_argmax():
    own = sampler(temperature=0.0, top_k=5, top_p=0.1)
    assert own.is_argmax
    assert own.choose(LOGITS, range(30), [[]] * 30) == LOGITS.argmax(-1).tolist()
    biased = sampler(temperature=0.0, logit_bias={6: 1000.0})
    assert not biased.is_argmax
    assert biased.choose(LOGITS, range(30), [[]] * 30) == [6] * 30


def test_the_first_of_several_is_likeliest():
    logits = torch.tensor([[0.0, 2.0, 2.0], [-torch.inf, -torch.inf, -5.0], [1.0, 1.0, 1.0]])
    assert likeliest(logits) == [1, 2, 0]
    assert likeliest(LOGITS[:, ::2]) == LOGITS[:, ::2].argmax(-1).tolist()
    assert likeliest(LOGITS[:0]) == []


@pytest.mark.parametrize("settings", [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}], ids=str)
def test_choice_depends_on_its_row_and_position_only(settings):
    own = sampler(**settings)
    positions = [7, 3, 3, 50, 8]
    together = own.choose(LOGITS[:5], positions, [[]] * 5)
    for row, position in enumerate(positions):
        assert own.choose(LOGITS[row : row + 1], [position], [[]]) == [together[row]]


DRAWS = 200_000


@pytest.mark.parametrize("settings", [{}, {"top_k": 4}, {"top_p": 0.8}, {"temperature": 2.0}], ids=str)
def test_choice_has_the_processed_law(settings):
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.0, -0.5, 0.3]])
    own = sampler(prompt=[0], size=6, **settings)
    exact = own.distribution(logits, [[]]).dense(0).numpy()
    drawn = own.choose(logits.expand(DRAWS, -1), range(DRAWS), [[]] * DRAWS)
    counts = np.bincount(drawn, minlength=6)
    assert counts[exact == 0].sum() == 0
    assert chisquare(counts[exact > 0], DRAWS * exact[exact > 0]).pvalue > 0.001
    # By lot alone it is about 0.002.
    assert np.abs(counts / DRAWS - exact).sum() / 2 < 0.005


def test_a_filter_only_removes():
    """A token that is chosen without filters and survives them is chosen with them: the noise is the token's own."""
    free = sampler().choose(LOGITS, range(30), [[]] * 30)
    filtered = sampler(top_k=50)
    kept = filtered.distribution(LOGITS, [[]] * 30).ids
    for row, token in enumerate(filtered.choose(LOGITS, range(30), [[]] * 30)):
        assert token == free[row] or free[row] not in kept[row]


def test_seed_and_choice_matter():
    def choices(seed: int, choice: int) -> list[int]:
        params = SamplingParams(temperature=2.0, seed=seed)
        return Sampler(params, choice, PROMPT, SIZE).choose(LOGITS, range(30), [[]] * 30)

    assert choices(1, 0) == choices(1, 0)
    different = [choices(1, 0), choices(2, 0), choices(1, 1), choices(0, 1)]
    assert len({tuple(each) for each in different}) == 4


def test_coins_differ_by_purpose_and_position():
    own = sampler()
    assert own.coins(5).draw() == own.coins(5).draw()
    assert len({own.coins(5).draw(), own.coins(6).draw(), own.coins(5, 1).draw(), own.coins(5, 2).draw()}) == 4


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 20},
        {"top_k": 2000, "top_p": 0.9},
        {"top_p": 0.9, "min_p": 0.1},
        {"logit_bias": {3: 1.0}},
        {"logit_bias": {3: 1.0}, "top_k": 20},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.3},
        {"temperature": 0.0, "repetition_penalty": 1.2, "top_k": 20},
        {"temperature": 0.0, "logit_bias": {3: 1.0}},
    ],
    ids=str,
)
def test_what_choosing_takes_for_a_while(settings, rows):
    """Measured, and not much less than what is said."""
    size = 4000
    own, logits = sampler(size=size, **settings), torch.randn(rows, size)
    with torch.inference_mode(), PeakBytes() as peak:
        own.choose(logits, range(rows), [[5] * row for row in range(rows)])
    assert peak.most <= own.scratch_bytes(rows) < 2.2 * peak.most
    assert sampler(temperature=0.0).scratch_bytes(rows) == 0


def test_draw():
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    assert [draw(p, coin) for coin in (1e-12, 0.2499, 0.25, 0.5, 0.7499, 0.75, 1 - 1e-12)] == [1, 1, 3, 3, 3, 4, 4]
    assert draw(2 * p, 0.5) == 3
    one = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    assert {draw(one, coin) for coin in (1e-300, 0.5, 1 - 2**-53)} == {2}


@pytest.mark.parametrize("place", [0, 17, SIZE - 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_gives_finite_logits(value, place):
    assert likeliest_of_model(LOGITS) == LOGITS.argmax(-1).tolist()
    assert likeliest_of_model(LOGITS[:0]) == []
    spoilt = LOGITS.clone()
    spoilt[5, place] = value
    with pytest.raises(UserError, match="not finite"):
        likeliest_of_model(spoilt)
    spoilt[5] = -float("inf")
    with pytest.raises(UserError, match="not finite"):
        likeliest_of_model(spoilt)
    spoilt[5, place] = -3e38
    assert likeliest_of_model(spoilt)[5] == place
