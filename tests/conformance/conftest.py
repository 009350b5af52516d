"""One model for all conformance tests, and what plain decoding makes of their prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from cases import PROMPTS, params

from hasten import LLM
from hasten.llm import Completion
from helpers import save_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder; `tiny-draft` lies beside it."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def llm(tiny: Path) -> LLM:
    return LLM(tiny, dtype="float32")


@pytest.fixture(scope="session")
def plain(llm: LLM) -> Callable[[int, str], Completion]:
    """(prompt's number, kind of sampling) to plain decoding's answer, each decoded alone, once."""

    @cache
    def answer(number: int, kind: str) -> Completion:
        return llm.generate([PROMPTS[number]], params(number, kind), "plain")[0].choices[0]

    return answer
