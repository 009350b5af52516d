"""`hasten generate`: where a text ends, what it may not say, and how likely its prompt was."""

from __future__ import annotations

import pytest

PROMPT = "Copy the list: red cat moon"


def test_ends_and_words(hasten):
    free = hasten("generate", PROMPT, "--max-tokens", "30", "--json").json()
    token = free["token_ids"][1]
    count = free["token_ids"].index(token) + 1
    stopped = hasten("generate", PROMPT, "--max-tokens", "30", "--stop-token-id", str(token), "--json").json()
    assert stopped["token_ids"] == free["token_ids"][:count]
    assert stopped["finish_reason"] == "stop" and free["text"].startswith(stopped["text"])
    longer = hasten("generate", PROMPT, "--max-tokens", "30", "--min-tokens", "30", "--json").json()
    assert len(longer["token_ids"]) == 30
    other = hasten("generate", PROMPT, "--max-tokens", "30", "--bad-word", "moon", "--bad-word", "cat", "--json").json()
    assert "moon" in free["text"] and "moon" not in other["text"] and "cat" not in other["text"]


def test_logprobs_of_the_prompt(hasten):
    got = hasten("generate", PROMPT, "--max-tokens", "3", "--prompt-logprobs", "2", "--json").json()
    assert len(got["prompt_logprobs"]) == got["prompt_tokens"]
    assert got["prompt_logprobs"][0] is None
    assert all(item["logprob"] <= 0 and len(item["top"]) == 2 for item in got["prompt_logprobs"][1:])


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--stop-token-id", "999999", "outside the vocabulary"),
        ("--stop-token-id", "-1", "must be token ids"),
        ("--min-tokens", "-1", "min_tokens must be"),
        ("--bad-word", "", "must be texts"),
        ("--prompt-logprobs", "101", "prompt_logprobs must be"),
    ],
)
def test_refused(hasten, option: str, value: str, words: str):
    ran = hasten("generate", PROMPT, option, value)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("hasten: ") and ran.err.count("\n") == 1 and words in ran.err
