"""Parameters as callers give them: taken for what they plainly mean, or refused in one sentence that names them."""

from __future__ import annotations

from dataclasses import fields
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten import SamplingParams, UserError


@pytest.mark.parametrize(
    ("settings", "meant"),
    [
        ({"n": 2.0}, {"n": 2}),
        ({"top_k": 50.0}, {"top_k": 50}),
        ({"top_k": np.int32(5)}, {"top_k": 5}),
        ({"max_tokens": torch.tensor(7)}, {"max_tokens": 7}),
        ({"temperature": np.float32(0.5)}, {"temperature": 0.5}),
        ({"temperature": torch.tensor(0.5)}, {"temperature": 0.5}),
        ({"top_p": Decimal("0.5")}, {"top_p": 0.5}),
        ({"logit_bias": {"100": 4}}, {"logit_bias": {100: 4}}),
        ({"logit_bias": {np.int64(3): np.float64(1.5)}}, {"logit_bias": {3: 1.5}}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"stop": np.array(["a"])}, {"stop": ("a",)}),
        ({"ignore_eos": np.bool_(True)}, {"ignore_eos": True}),
        ({"temperature": 1e-38}, {"temperature": 1e-30}),
    ],
)
def test_plain_meaning(settings, meant):
    params = SamplingParams(**settings)
    assert params == SamplingParams(**meant)
    for name, value in meant.items():
        assert type(getattr(params, name)) is type(value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"n": 1.5}, "n must be a whole number, not 1.5"),
        ({"top_k": 2.5}, "top_k must be a whole number, not 2.5"),
        ({"top_k": float("inf")}, "top_k must be a whole number, not inf"),
        ({"logprobs": True}, "logprobs must be a whole number, not True"),
        ({"max_tokens": "5"}, "max_tokens must be a whole number, not '5'"),
        ({"seed": "a" * 99}, f"seed must be a whole number, not '{'a' * 36}..."),
        ({"temperature": True}, "temperature must be a number, not True"),
        ({"temperature": np.bool_(True)}, "temperature must be a number, not an object of type bool"),
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"top_p": [0.5]}, "top_p must be a number, not an object of type list"),
        ({"top_p": np.array([0.5])}, "top_p must be a number, not an object of type ndarray"),
        ({"stop": 5}, "stop must be text or a list of texts, not 5"),
        ({"stop": b"a"}, "stop must be text or a list of texts, not b'a'"),
        ({"stop": ["a", 1]}, "stop must be text, not 1"),
        ({"stop": "a\ud800"}, "stop is no text: character 2 is no Unicode character"),
        ({"ignore_eos": "no"}, "ignore_eos must be True or False, not 'no'"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, not 1"),
        ({"logit_bias": [1]}, "logit_bias must map token ids to numbers, not be an object of type list"),
        ({"logit_bias": {1.5: 1}}, "a token id in logit_bias must be a whole number, not 1.5"),
        ({"logit_bias": {"a": 1}}, "a token id in logit_bias must be a whole number, not 'a'"),
        ({"logit_bias": {True: 1}}, "a token id in logit_bias must be a whole number, not True"),
        ({"logit_bias": {1: "x"}}, "logit_bias of token 1 must be a number, not 'x'"),
        ({"logit_bias": {1: None}}, "logit_bias of token 1 must be a number, not None"),
        ({"constraint": "x"}, "constraint must be a Constraint, not 'x'"),
        ({"tenant": 5}, "tenant must be text, not 5"),
        ({"acceptance": []}, "acceptance must be match, max or typical"),
    ],
)
def test_refused_by_name(settings, sentence):
    with pytest.raises(UserError) as error:
        SamplingParams(**settings)
    assert str(error.value) == sentence


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingParams)])
def test_none_is_the_default(name):
    assert SamplingParams(**{name: None}) == SamplingParams()


anything = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.complex_numbers(),
        st.decimals(), st.fractions(), st.text(st.characters(categories=["Cs"]), min_size=1),
        st.sampled_from([np.float16(1), np.array(1), np.array([1, 2]), torch.tensor([[1.0]]), object()]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.integers(), st.text(), st.none()), inner, max_size=3)
    ),
    max_leaves=4,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from([field.name for field in fields(SamplingParams)]), anything, max_size=4))
def test_anything_is_taken_or_refused_in_a_sentence(settings):
    try:
        params = SamplingParams(**settings)
    except UserError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 300
        return
    assert type(params.n) is int and type(params.top_k) is int
    assert isinstance(params.temperature, (int, float)) and type(params.ignore_eos) is bool
    assert all(type(token) is int for token in params.logit_bias)
