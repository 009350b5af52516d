"""Every field of a generation_config.json is honoured, asks for nothing, or is named in one line."""

from __future__ import annotations

import json
import shutil
import warnings
from math import inf
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from hasten import LLM, SamplingParams, UserError
from hasten.errors import Notice
from hasten.generation_config import HONOURED, asked, unhonoured

FIELDS = sorted(vars(GenerationConfig()))


@pytest.mark.parametrize(
    ("config", "meant"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_k": 5}, {}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"do_sample": True, "top_k": 50.0}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": True, "temperature": None, "max_new_tokens": 7}, {"temperature": 1.0, "max_tokens": 7}),
        ({"stop_strings": ["a", "b"], "max_new_tokens": None}, {"stop": ("a", "b")}),
        ({"stop_strings": "a"}, {"stop": ("a",)}),
        (
            {"suppress_tokens": [3, 900], "bad_words_ids": [[5], [6, 7], [8, 900]]},
            {"logit_bias": {3: -inf, 5: -inf}, "bad_words": ((6, 7),)},
        ),
        ({"min_new_tokens": 4}, {"min_tokens": 4}),
    ],
)
def test_what_is_honoured(config, meant):
    assert asked(config, 100) == SamplingParams(**meant)


@pytest.mark.parametrize(
    "config",
    [
        {"do_sample": True, "temperature": "hot"},
        {"max_new_tokens": 1.5},
        {"stop_strings": 5},
        {"suppress_tokens": 5},
        {"suppress_tokens": [1.5]},
        {"bad_words_ids": [5]},
        {"bad_words_ids": [[]]},
        {"repetition_penalty": [1]},
    ],
)
def test_what_cannot_be(config):
    with pytest.raises(UserError, match=next(name for name in config if name != "do_sample").partition("_")[0]):
        asked(config, 100)


def test_what_is_named():
    config = {
        "no_repeat_ngram_size": 3, "num_beams": 4, "guidance_scale": 1.0, "min_new_tokens": 0, "max_length": 4096,
        "sequence_bias": None, "forced_eos_token_id": 2, "a_field_of_tomorrow": 1, "_from_model_config": True,
        "output_attentions": False,
    }  # fmt: skip
    named = ["no_repeat_ngram_size", "num_beams", "forced_eos_token_id", "a_field_of_tomorrow"]
    assert unhonoured(config, 4096) == named
    assert unhonoured({"max_length": 512}, 4096) == ["max_length"]
    assert unhonoured({"max_length": 512, "max_new_tokens": 3}, 4096) == []


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_of_transformers_is_asked_for_by_its_own_default(name):
    assert unhonoured(GenerationConfig().to_dict(), 4096) == []
    assert name in HONOURED or isinstance(unhonoured({name: None}, 4096), list)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(FIELDS), values, max_size=6))
def test_any_file_is_read_or_refused_in_a_sentence(config):
    try:
        unhonoured(config, 100)
        asked(config, 100)
    except UserError as error:
        assert "\n" not in str(error)


def test_a_model_honours_its_file(tiny: Path, tmp_path: Path):
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    first = LLM(tiny, dtype="float32").generate("the cat", SamplingParams(max_tokens=1))[0].token_ids[0]
    config = {"suppress_tokens": [first], "max_new_tokens": 3, "eos_token_id": [1, None], "num_beams": 2}
    (copy / "generation_config.json").write_text(json.dumps(config))
    with pytest.warns(Notice) as said:
        llm = LLM(copy, dtype="float32")
    sentences = [str(each.message) for each in said if issubclass(each.category, Notice)]
    assert sentences == ["generation_config.json asks for what hasten does not do: num_beams"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        answer = llm.generate("the cat")[0]
    assert first not in answer.token_ids
    assert len(answer.token_ids) <= 3
