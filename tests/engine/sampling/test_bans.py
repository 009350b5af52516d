"""Words that must not be said and ends that must wait: against a search through the whole output."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten import SamplingParams, UserError
from hasten.engine.sampling.bans import Bans, spelled
from helpers import END, VOCABULARY, make_tokenizer

TOKENS = st.integers(0, 4)
WORDS = st.sets(st.lists(TOKENS, min_size=1, max_size=4).map(tuple), max_size=5)


@given(st.lists(st.lists(TOKENS, max_size=4), max_size=5), st.lists(TOKENS, max_size=5), WORDS, st.integers(0, 12))
def test_against_the_whole_output(steps, path, words, minimum):
    bans = Bans({3, 4}, minimum, words)
    for step in steps:
        bans.committed(step)
    whole = [token for step in steps for token in step] + path
    expected = {
        token for token in range(5) for word in words if (*whole, token)[-len(word) :] == word and len(whole) + 1 > 0
    } | ({3, 4} if len(whole) < minimum else set())
    assert set(bans.behind(path)) == expected
    assert bans.any or not expected
    logits = torch.zeros(2, 5)
    applied = bans.applied(logits, [path, path])
    assert not logits.any()
    for row in applied:
        assert set((row == -torch.inf).nonzero()[:, 0].tolist()) == expected


def test_spellings():
    tokenizer = make_tokenizer()
    spellings = spelled(tokenizer, ["moon", (5, 6)], VOCABULARY)
    assert {tokenizer.decode(list(word)) for word in spellings - {(5, 6)}} == {"moon", " moon"}
    with pytest.raises(UserError, match="need a tokenizer"):
        spelled(None, ["moon"], VOCABULARY)
    with pytest.raises(UserError, match="token id 150 is outside the vocabulary of 150"):
        spelled(tokenizer, [(150,)], VOCABULARY)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stop_token_ids": "13"}, "stop_token_ids must be a list of token ids, not '13'"),
        ({"stop_token_ids": 13}, "stop_token_ids must be a list of token ids, not 13"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids: a token id must be a whole number, not 1.5"),
        ({"stop_token_ids": [True]}, "stop_token_ids: a token id must be a whole number, not True"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be token ids"),
        ({"min_tokens": -1}, "min_tokens must be a whole number"),
        ({"min_tokens": 1.5}, "min_tokens must be a whole number"),
        ({"min_tokens": 5, "max_tokens": 4}, r"min_tokens \(5\) must not be more than max_tokens \(4\)"),
        ({"bad_words": "cat"}, "bad_words must be a list"),
        ({"bad_words": [""]}, "bad_words must be texts"),
        ({"bad_words": [[]]}, "bad_words must be texts"),
        ({"bad_words": [[1, "a"]]}, "bad_words: a token id must be a whole number, not 'a'"),
        ({"bad_words": [None]}, "bad_words must be a list"),
    ],
)
def test_parameters_that_make_no_sense(fields, words):
    with pytest.raises(UserError, match=words):
        SamplingParams(**fields)


def test_ids_outside_the_vocabulary(llm):
    with pytest.raises(UserError, match="stop_token_ids: token id 150 is outside"):
        llm.generate("the", SamplingParams(stop_token_ids=[VOCABULARY]))
    with pytest.raises(UserError, match="bad_words: token id 150 is outside"):
        llm.generate("the", SamplingParams(bad_words=[[3, VOCABULARY]]))


def test_where_nothing_is_possible(llm):
    """What would be chosen then is no token that the request allows."""
    everything = {token: -float("inf") for token in range(VOCABULARY)}
    for params in (
        SamplingParams(logit_bias=everything, max_tokens=3),
        SamplingParams(logit_bias=everything, max_tokens=3, temperature=1.0, seed=1),
        SamplingParams(bad_words=[[token] for token in range(VOCABULARY)], max_tokens=3),
    ):
        with pytest.raises(UserError, match="no token is possible"):
            llm.generate("the", params)
    assert llm.engine.cache.used_bytes == 0


def test_ends_wait(llm):
    """Until then nothing ends the text: end-of-text, other tokens, strings."""
    free = llm.generate("the", SamplingParams(max_tokens=40, ignore_eos=True))[0].token_ids
    stop = free[3]
    first = free.index(stop) + 1
    (got,) = llm.generate("the", SamplingParams(max_tokens=40, stop_token_ids=[stop]))[0].choices
    assert got.token_ids == free[:first] and got.finish_reason == "stop"
    assert got.text == llm.tokenizer.decode(free[: first - 1], skip_special_tokens=True)
    (got,) = llm.generate("the", SamplingParams(max_tokens=40, stop_token_ids=[stop], min_tokens=20))[0].choices
    assert stop not in got.token_ids[:20] and END not in got.token_ids[:20] and len(got.token_ids) > 20
