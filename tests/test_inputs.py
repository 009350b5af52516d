"""Prompts as callers give them: read for what they plainly mean, or refused in one sentence, before anything runs."""

from __future__ import annotations

from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from hasten import LLM, SamplingParams, UserError
from hasten.inputs import messages, prompts

SHORT = SamplingParams(max_tokens=2)
TEXT = "the cat and"
TALK = [{"role": "user", "content": "the cat"}]


def ids_of(given: object) -> list[list[int]]:
    return [list(each) for each in prompts(given, lambda text: [len(text)], lambda talk: [100 + len(talk)])]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("four", [[4]]),
        (np.str_("four"), [[4]]),
        (["a", "bb"], [[1], [2]]),
        (np.array(["a", "bb"]), [[1], [2]]),
        ([1, 2], [[1, 2]]),
        ((1, 2), [[1, 2]]),
        (range(2), [[0, 1]]),
        ([np.int64(1), torch.tensor(2)], [[1, 2]]),
        (np.array([1, 2], dtype=np.uint16), [[1, 2]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (torch.tensor([1, 2]), [[1, 2]]),
        (torch.tensor([[1, 2]]), [[1, 2]]),
        ([torch.tensor([1]), [2, 3], "four"], [[1], [2, 3], [4]]),
        ({"prompt": "four"}, [[4]]),
        ([{"prompt": "four"}, {"prompt_token_ids": [7]}], [[4], [7]]),
        ({"messages": TALK}, [[101]]),
        (TALK, [[101]]),
        (TALK[0], [[101]]),
        ([TALK, TALK * 2], [[101], [102]]),
        ({"input_ids": [1, 2], "attention_mask": [1, 1]}, [[1, 2]]),
        ({"input_ids": [[1, 2], [9, 3]], "attention_mask": [[1, 1], [0, 1]]}, [[1, 2], [3]]),
        ({"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1, 1]])}, [[1, 2]]),
        ([{"input_ids": np.array([[5]])}], [[5]]),
        ([], []),
        ([[]], [[]]),
    ],
)
def test_plain_meaning(given, meant):
    assert ids_of(given) == meant


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (b"the cat", "a prompt must be text, token ids or messages, not b'the cat'"),
        ([b"a"], "must be text"),
        (None, "not None"),
        ([None], "not None"),
        (5, "whole numbers in a list, not 5"),
        ([1, None], "a token id must be a whole number, not None"),
        ([1, "a"], "a token id must be a whole number, not 'a'"),
        ([1, 2.0], "token ids must be whole numbers, not 2.0"),
        ([True, False], "a token id must be a whole number, not True"),
        (np.array([1.5]), "whole numbers in a list, not 1.5"),
        (np.zeros((1, 1, 1), dtype=int), "an array of one axis or two, not of 3"),
        ([[1, [2]]], "a token id must be a whole number"),
        ({1, 2}, "not an object of type set"),
        ({"text": "a"}, "must have 'prompt'"),
        ({"prompt": 5}, "must have 'prompt'"),
        ({"input_ids": 5}, "input_ids must be token ids, not 5"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask must be of the shape"),
        ("a\ud800", "the prompt is no text: character 2"),
    ],
)
def test_refused(given, words):
    with pytest.raises(UserError) as error:
        ids_of(given)
    assert "\n" not in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize("given", ["hi", b"hi", None, 5, {"role": "user"}, ["hi"], [{"content": "a"}], [{"role": 5}]])
def test_no_messages(given):
    with pytest.raises(UserError, match="role"):
        messages(given)


def test_a_tokenizer_s_output_is_a_prompt(llm: LLM):
    expected = llm.generate(TEXT, SHORT)[0]
    one = llm.tokenizer(TEXT)
    several = llm.tokenizer([TEXT, "the moon and the stars"])
    for given in (one, llm.tokenizer(TEXT, return_tensors="pt"), [{"prompt": TEXT}], np.array(llm.encode(TEXT))):
        (generation,) = llm.generate(given, SHORT)
        assert generation.prompt_token_ids == expected.prompt_token_ids
        assert generation.token_ids == expected.token_ids
    assert [each.prompt_token_ids for each in llm.generate(several, SHORT)] == several["input_ids"]
    assert llm.generate(TALK, SHORT)[0].token_ids == llm.chat(TALK, SHORT).token_ids
    assert list(llm.stream(one, SHORT))[-1].completion.token_ids == expected.token_ids


def test_what_is_wrong_is_said_before_anything_runs(llm: LLM):
    for arguments in (
        ([TEXT, [1, "a"]], SHORT),
        (TEXT, {"max_tokens": 2}),
        (TEXT, SHORT, 5),
    ):
        with pytest.raises(UserError):
            llm.generate(*arguments)
        assert not llm.engine.busy
    with pytest.raises(UserError, match="give one prompt, not 2"):
        next(llm.stream([TEXT, TEXT], SHORT))
    assert llm.generate(TEXT, [None], [None])[0].prompt_token_ids


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.binary(max_size=3),
    st.sampled_from([np.int8(3), np.array([1]), np.array(1.5), torch.tensor([[1]]), "\ud800", SimpleNamespace()]),
)  # fmt: skip
keys = st.sampled_from(["prompt", "prompt_token_ids", "messages", "input_ids", "attention_mask", "role", "content", 1])


@hypothesis.given(
    st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.tuples(inner, inner), st.dictionaries(keys, inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_anything_is_read_or_refused_in_a_sentence(anything):
    try:
        read = ids_of(anything)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert all(type(token) is int for prompt in read for token in prompt)
