"""A model that people know, pulled by its name: skipped where it is not here and cannot be had."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hasten import LLM, SamplingParams
from hasten.catalogue.entries import CATALOGUE
from hasten.catalogue.pulling import pull
from hasten.errors import UserError

METHODS = ("ngram", "suffix", "token-recycling")
PROMPTS = (
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nSay again: a red cat, a blue moon, a red cat.<|im_end|>\n<|im_start|>assistant\n",
)


@pytest.fixture
def smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Its name, as a command takes it; HASTEN_TEST_PULL=1 pulls it for this test, if it is not here."""
    monkeypatch.setenv("HASTEN_CACHE", os.environ["HASTEN_TEST_CACHE"])
    entry = CATALOGUE["smollm2"]
    here = entry.path
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    if here.is_file():
        # What is measured meanwhile stays with the test.
        entry.path.parent.mkdir()
        entry.path.symlink_to(here)
    elif os.environ.get("HASTEN_TEST_PULL") == "1":
        try:
            pull(entry, lambda done, total: None)
        except UserError as error:
            pytest.skip(str(error))
    else:
        pytest.skip("smollm2 is not here (`hasten pull smollm2`, or HASTEN_TEST_PULL=1)")
    return entry.name


def test_a_real_model_says_the_same_with_every_method(smollm2: str) -> None:
    llm = LLM(smollm2)
    params = SamplingParams(max_tokens=24)
    plain = llm.generate(list(PROMPTS), params)
    assert "Paris" in plain[0].text
    for method in METHODS:
        assert [each.token_ids for each in llm.generate(list(PROMPTS), params, method)] == [
            each.token_ids for each in plain
        ]
