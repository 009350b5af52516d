"""What plain decoding makes of the conformance tests' prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from cases import PROMPTS, params

from hasten import LLM
from hasten.engine.drafting.cost import VerifyCost
from hasten.llm import Completion
from hasten.methods.drafters import auto
from hasten.methods.drafters.auto_candidate import Typical


@pytest.fixture(scope="module", autouse=True)
def free_rows() -> Iterator[None]:
    """For `auto`, rows and drafts cost next to nothing: what it drafts must not depend on how busy the machine is."""

    def count(times: Typical, seconds: float) -> None:
        times.count += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Typical, "add", count)
        patch.setattr(auto, "verify_cost", lambda model, folder: VerifyCost((1, 2, 64), (64,), ((1, 1.001, 1.01),), 0))
        yield


@pytest.fixture(autouse=True)
def beside_heads(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods whose heads a case names find them: `heads/...` is below the model's folder."""
    monkeypatch.chdir(tiny)


@pytest.fixture(scope="session")
def plain(llm: LLM) -> Callable[[int, str], Completion]:
    """(prompt's number, kind of sampling) to plain decoding's answer, each decoded alone, once."""

    @cache
    def answer(number: int, kind: str) -> Completion:
        return llm.generate([PROMPTS[number]], params(number, kind), "plain")[0].choices[0]

    return answer
