"""`hasten generate`: biases on the command line, and log-probabilities without --json."""

from __future__ import annotations

import pytest


def test_a_bias_changes_the_text(hasten):
    command = ("generate", "the cat", "--max-tokens", "1", "--json")
    first = hasten(*command).json()["token_ids"][0]
    assert hasten(*command, "--logit-bias", f"{first}=-inf").json()["token_ids"] != [first]
    assert hasten(*command, "--logit-bias", "7=1e9", "--logit-bias", "8=1e10").json()["token_ids"] == [8]


@pytest.mark.parametrize("given", ["7", "7=", "=1", "a=1", "7=much", "7=nan"])
def test_a_bias_that_is_none(hasten, given: str):
    ran = hasten("generate", "hi", "--logit-bias", given)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("hasten: logit") and ran.err.count("\n") == 1


def test_log_probabilities_are_printed(hasten):
    ran = hasten("generate", "the cat", "--max-tokens", "2", "--logprobs", "1")
    _, *lines = ran.out.removesuffix("\n").split("\n")
    assert len(lines) == 2
    for line in lines:
        chosen, likeliest = line.split("\t")
        assert chosen == likeliest
        assert float(chosen.rpartition(" ")[2]) <= 0
