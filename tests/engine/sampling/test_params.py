"""Sampling parameters out of range are refused in one sentence."""

from __future__ import annotations

from dataclasses import fields
from typing import get_type_hints

import pytest

from hasten import SamplingParams, UserError
from hasten.engine import Limits

BIAS = "logit_bias must be finite numbers in float32, or -infinity, which bans a token"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"temperature": -0.1}, "temperature must be between 0 and 100"),
        ({"temperature": float("nan")}, "temperature must be between 0 and 100"),
        ({"top_k": -1}, "top_k must be 0 (off) or positive"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"min_p": -0.1}, "min_p must be between 0 and 1"),
        ({"min_p": 1.5}, "min_p must be between 0 and 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be between 1e-6 and 1e6"),
        ({"repetition_penalty": 1e39}, "repetition_penalty must be between 1e-6 and 1e6"),
        ({"logit_bias": {1: 0.0, 2: 1e39}}, BIAS),
        ({"logit_bias": {1: float("nan")}}, BIAS),
        ({"logit_bias": {1: float("inf")}}, BIAS),
        ({"typical_epsilon": float("inf")}, "typical_epsilon must be a finite number, not inf"),
        ({"typical_delta": float("inf")}, "typical_delta must be a finite number, not inf"),
        ({"presence_penalty": 2.1}, "presence_penalty must be between -2 and 2"),
        ({"frequency_penalty": -2.1}, "frequency_penalty must be between -2 and 2"),
        ({"n": 0}, "n must be at least 1"),
        ({"stop": ""}, "stop strings must not be empty"),
        ({"stop": ["ab", ""]}, "stop strings must not be empty"),
        ({"logprobs": -1}, "logprobs must be between 0 and 100"),
        ({"logprobs": 101}, "logprobs must be between 0 and 100"),
        ({"acceptance": "most"}, "acceptance must be match, max or typical"),
        ({"typical_epsilon": 0}, "typical_epsilon and typical_delta must be positive"),
        ({"typical_delta": -1}, "typical_epsilon and typical_delta must be positive"),
    ],
)
def test_out_of_range(settings, message):
    with pytest.raises(UserError) as error:
        SamplingParams(**settings)
    assert str(error.value) == message


def test_defaults_are_greedy_and_neutral():
    params = SamplingParams()
    assert params.greedy
    assert not params.penalised
    assert params.stop == ()
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(frequency_penalty=0.1).penalised


@pytest.mark.parametrize("limits", [{"sequences": 0}, {"rows": 0}, {"rows": -3}])
def test_limits(limits):
    with pytest.raises(UserError, match="at least 1"):
        Limits(**limits)


NUMBERS = [field.name for field in fields(SamplingParams) if get_type_hints(SamplingParams)[field.name] is float]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_is_nan_or_infinite(name, value):
    with pytest.raises(UserError, match=name):
        SamplingParams(**{name: value})


def test_a_bias_of_minus_infinity_bans_a_token():
    assert SamplingParams(logit_bias={3: -float("inf")}).logit_bias[3] == -float("inf")
