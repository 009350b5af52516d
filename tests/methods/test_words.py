"""Words: tokens of the target under numbers of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hasten import LLM, UserError
from hasten.methods.drafters.words import TOKEN_MAP, Words

CPU = torch.device("cpu")


def test_tokens_have_numbers_and_others_share_one() -> None:
    words = Words([3, 7, 9], CPU, unknown=3)
    assert len(words) == 3 and words.tokens.tolist() == [3, 7, 9]
    assert words.read([9, 8, 3, -1]) == [2, 3, 0, 3]
    assert words.known([9, 8, 3]) == [2, 0]
    assert Words([3, 7, 9], CPU).read([9, 8]) == [9, 8]


@pytest.mark.parametrize("tokens", ["3", [3, 1], [1, 1], [-1, 2], [1, 2, 3], [1, 2.0], [True, 2], {"1": 2}])
def test_a_map_that_cannot_be(llm: LLM, tokens: object) -> None:
    config = replace(llm.model.config, vocab_size=3, source={TOKEN_MAP: tokens})
    with pytest.raises(UserError, match="token_map must be 2 different tokens in ascending order"):
        Words.of(config, CPU)


def test_a_map(llm: LLM) -> None:
    words = Words.of(replace(llm.model.config, vocab_size=3, source={TOKEN_MAP: [4, 6]}), CPU)
    assert words is not None and words.read([6, 5]) == [1, 2]
    assert Words.of(llm.model.config, CPU) is None
