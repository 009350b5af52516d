"""Every drafter on a model with a recurrent layer: the tokens are plain decoding's, whatever has to be undone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from cases import KINDS, PROMPTS, SPECS, params
from recurrence import hybrid

from hasten import LLM
from hasten.cache import Cache
from hasten.engine import Engine, Limits
from hasten.methods.drafters.sequences import Sequences
from hasten.methods.drafters.small_model import SmallModelDrafter
from hasten.model import load_model
from hasten.model.native.library import LIBRARY

NUMBERS = list(range(2, len(PROMPTS), 9))
WORK = [(number, list(KINDS)[index % len(KINDS)]) for index, number in enumerate(NUMBERS)]
BACKENDS = ["torch", *(["native"] if LIBRARY.exists() else [])]


@pytest.fixture(scope="module")
def engine(tiny: Path):
    """engine(backend, replays, **limits): of the hybrid model."""

    @cache
    def load(backend: str) -> LLM:
        return LLM(tiny, dtype="float32", backend=backend)

    def make(backend: str, replays: bool, **limits: int) -> Engine:
        llm = load(backend)
        model = hybrid(llm.model, replays)
        return Engine(model, llm.tokenizer, llm.engine.end_ids, Limits(**limits), str(llm.folder))

    return make


def decode(made: Engine, spec: str, work: Sequence[tuple[int, str]] = WORK) -> list[list[int]]:
    requests = [made.add(PROMPTS[number], params(number, kind), spec)[0] for number, kind in work]
    for _ in made.run():
        pass
    assert made.cache.used_bytes == 0
    return [request.output for request in requests]


@pytest.fixture(scope="module")
def expected(engine):
    """Plain decoding's answers, each alone, in one pass per token."""
    return {backend: [decode(engine(backend, False), "plain", [job])[0] for job in WORK] for backend in BACKENDS}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_drafter(engine, expected, backend, spec):
    assert decode(engine(backend, len(spec) % 2 == 0, rows=24), spec) == expected[backend]


@pytest.mark.parametrize("replays", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        "draft-model",
        "draft-model:confidence=0,length=4",
        "draft-model:width=3,length=3",
        "dyspec:nodes=12",
    ],
)
def test_a_recurrent_model_that_drafts(engine, expected, tiny, spec, replays):
    """Its trees grow level by level, what was drafted is undone; asked twice, it reads its last token anew."""
    made = engine("torch", replays)
    drafter = made.drafter(spec)[1]
    assert isinstance(drafter, SmallModelDrafter)
    drafter.model = hybrid(load_model(f"{tiny}-draft", "float32", backend="torch"), not replays)
    drafter.cache = Cache(drafter.model.config.layers, drafter.model.cache_dtype, drafter.model.device)
    drafter._sequences = Sequences(drafter.cache)
    assert decode(made, spec) == expected["torch"]
    (request,) = made.add(PROMPTS[20], params(20, "greedy"), spec)
    made.step()
    made.step()
    assert drafter.propose(request, 8).tokens == drafter.propose(request, 8).tokens
    made.abort(request)
    assert drafter.cache.used_bytes == 0


def test_choices_share_the_prompts_state(engine):
    made = engine("torch", False)
    asked = params(12, "sampled", n=3)
    alone = []
    for spec in ("plain", "token-recycling:shared=false,nodes=16"):
        requests = made.add(PROMPTS[12], asked, spec)
        for _ in made.run():
            pass
        alone.append([request.output for request in requests])
    assert alone[0] == alone[1]
    assert len({tuple(output) for output in alone[0]}) == 3
