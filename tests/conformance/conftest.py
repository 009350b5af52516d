"""What plain decoding makes of the conformance tests' prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from cases import PROMPTS, params

from hasten import LLM
from hasten.llm import Completion


@pytest.fixture(scope="session")
def plain(llm: LLM) -> Callable[[int, str], Completion]:
    """(prompt's number, kind of sampling) to plain decoding's answer, each decoded alone, once."""

    @cache
    def answer(number: int, kind: str) -> Completion:
        return llm.generate([PROMPTS[number]], params(number, kind), "plain")[0].choices[0]

    return answer
