"""What all heads have in common: what their drafts take for a while is said beforehand."""

from __future__ import annotations

from typing import Any

import pytest

from hasten import LLM, SamplingParams
from hasten.engine import Drafter, Target
from hasten.engine.creation import create
from helpers import PeakBytes

PROMPTS = [[5, 17, 40, 5, 17], list(range(60, 90))]
NODES = 24
FORMS = ("torch float32", "torch bfloat16", "native float32", "native bfloat16")


@pytest.fixture(scope="module", params=FORMS)
def composed(request: pytest.FixtureRequest, llm: LLM) -> LLM:
    backend, dtype = request.param.split()
    return LLM(llm.folder, dtype=dtype, backend=backend)


def measured(llm: LLM, drafter: Drafter, asked: SamplingParams) -> list[tuple[int, int]]:
    """Per round of drafts for a batch: bytes that they took at most, and what was said."""
    requests = [llm.engine.add(prompt, asked, drafter)[0] for prompt in PROMPTS]
    rounds = []
    while not all(request.output for request in requests):
        llm.engine.step()
    for _ in range(3):
        said = drafter.scratch_bytes(requests, NODES) + drafter.growth_bytes(requests)
        with PeakBytes() as peak:
            drafter.propose_all(requests, [NODES] * len(requests))
        rounds.append((peak.most, said))
        llm.engine.step()
    for request in requests:
        llm.engine.abort(request)
    return rounds


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8}], ids=str)
@pytest.mark.parametrize("slug", ["medusa", "hydra", "chimera", "eagle", "ppd", "hidden-transfer"])
def test_drafting_takes_no_more_than_is_said(composed: LLM, slug: str, settings: dict[str, Any]) -> None:
    drafter = create(f"{slug}:sized=false", Target(composed.model, composed.tokenizer, str(composed.folder)))
    assert isinstance(drafter, Drafter)
    rounds = measured(composed, drafter, SamplingParams(max_tokens=20, seed=1, ignore_eos=True, **settings))
    assert max(taken for taken, _ in rounds) > 0
    assert all(taken <= said for taken, said in rounds)
