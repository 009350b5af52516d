"""What a drafter learned from one tenant is nothing to another: the same figures, whatever was decoded before."""

from __future__ import annotations

import pytest
from cases import PROMPTS, SPECS, params

from hasten.engine import Engine

SHARING = [
    "token-recycling",
    "aded",
    "stand:minimum=1,maximum=2",
    "specmemo:drafter=aded",
    "suffix:minimum_score=1+token-recycling",
]
NUMBERS = (2, 3, 5, 9, 12, 30)


def decode(engine: Engine, spec: str, tenant: str, acceptance: str):
    """Tokens, and what was proposed and accepted, of some prompts one after another."""
    figures = []
    for number in NUMBERS:
        asked = params(number, "sampled", tenant=tenant, acceptance=acceptance)
        (request,) = engine.add(PROMPTS[number], asked, spec)
        list(engine.run())
        figures.append((request.output, request.statistics.proposed, request.statistics.accepted_per_step))
    return figures


@pytest.mark.parametrize("acceptance", ["match", "max"])
@pytest.mark.parametrize("spec", [*SPECS, *SHARING])
def test_tenants_learn_nothing_of_each_other(llm, spec, acceptance):
    def fresh() -> Engine:
        return Engine(llm.model, llm.tokenizer, llm.engine.end_ids, folder=str(llm.folder))

    engine = fresh()
    first = decode(engine, spec, "one", acceptance)
    assert decode(engine, spec, "two", acceptance) == decode(fresh(), spec, "two", acceptance) == first
