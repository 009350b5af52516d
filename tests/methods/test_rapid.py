"""RAPID: what its drafter reads, how long it drafts, and that it leaves no trace."""

from __future__ import annotations

from itertools import pairwise

import pytest

from hasten import LLM, SamplingParams, UserError
from hasten.engine import Engine
from hasten.methods.drafters.rapid import Rapid
from hasten.model import Rows
from helpers import same

SHORT = "rapid:head=2,tail=4,chunk=4,least=8,confidence=0"
PROMPT = [number * 13 % 140 + 2 for number in range(60)]


@pytest.fixture
def engine(llm: LLM) -> Engine:
    return Engine(llm.model, llm.tokenizer, llm.engine.end_ids, folder=str(llm.folder))


def begun(engine: Engine, spec: str, prompt=PROMPT, steps: int = 1, **settings):
    """A request after some steps, and its drafter."""
    asked = SamplingParams(**{"max_tokens": 30, "ignore_eos": True, **settings})
    (request,) = engine.add(prompt, asked, spec)
    for _ in range(steps):
        engine.step()
    drafter = engine.drafter(spec)[1]
    assert isinstance(drafter, Rapid)
    return request, drafter


def test_it_reads_the_short_prompt_and_the_whole_answer(engine):
    request, drafter = begun(engine, SHORT, steps=4)
    length = drafter.length(request)
    text = drafter.text(request, 0, length)
    short = text[: length - len(request.output)]
    assert len(text) == length and text[len(short) :] == request.output
    assert short[:2] == PROMPT[:2] and short[-4:] == PROMPT[-4:] and len(short) <= 2 + 8 + 4
    for start in range(0, length, 3):
        assert drafter.text(request, start, min(start + 5, length)) == text[start : start + 5]


def test_a_draft_is_what_the_model_says_to_the_short_prompt(llm, engine):
    request, drafter = begun(engine, SHORT, steps=3)
    draft = drafter.propose(request, 6)
    known = drafter.text(request, 0, drafter.length(request))
    for token in draft.tokens:
        sequence = llm.engine.cache.sequence()
        logits = llm.model.forward(Rows.of(sequence, known, 0), [len(known) - 1])
        sequence.release()
        assert int(logits.argmax()) == token
        known = [*known, token]
    assert draft.is_chain and len(draft) == 6


def test_the_target_drafts_for_prompts_that_were_shortened_only(engine):
    request, drafter = begun(engine, "rapid", steps=2)
    assert drafter.length(request) == len(request.tokens) and len(drafter.propose(request, 6)) == 0


def test_another_model_drafts_for_all(llm, tiny, engine):
    request, drafter = begun(engine, f"rapid:model={tiny}-draft,confidence=0", steps=2)
    assert len(drafter.propose(request, 6)) == 6
    assert drafter.weights and not Rapid.weights.fget(engine.drafter(SHORT)[1])  # type: ignore[attr-defined]


def test_drafts_grow_and_shrink(engine):
    request, drafter = begun(engine, SHORT, steps=2)
    lengths = []
    for _ in range(6):
        before = len(request.statistics.accepted_per_step)
        draft = drafter.propose(request, 64)
        engine.step()
        accepted = request.statistics.accepted_per_step[before:]
        lengths.append((len(draft), accepted == [len(draft)]))
    for (length, whole), (following, _) in pairwise(lengths):
        assert following in (min(length + 2, 16) if whole else max(1, length - 1), request.stopper.left)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 0.8, "acceptance": "max"}])
def test_everything_is_given_back(llm, engine, settings):
    begun(engine, SHORT, seed=settings.pop("seed", 1), **settings)
    list(engine.run())
    drafter = engine.drafter(SHORT)[1]
    assert drafter.memory_bytes == 0


def test_the_same_tokens(llm):
    prompts = [PROMPT[:length] for length in (1, 5, 20, 60)]
    for sampling in (SamplingParams(max_tokens=20), SamplingParams(max_tokens=20, temperature=0.9, seed=4)):
        plain = llm.generate(prompts, sampling, "plain")
        for got, expected in zip(llm.generate(prompts, sampling, SHORT), plain, strict=True):
            same(got.choices[0], expected.choices[0])


@pytest.mark.parametrize(
    "settings, told",
    [
        ("head=0", "positive"),
        ("chunk=3", "at least 4"),
        ("share=1", "between 0 and 1"),
        ("length=20,most=16", "length"),
        ("retriever=nothing-here", "sentence"),
        ("model=/nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_asked(llm, settings, told):
    with pytest.raises(UserError, match=told):
        LLM(llm.folder, f"rapid:{settings}").generate([PROMPT], SamplingParams(max_tokens=2))


TRANSFER = SHORT.replace("rapid:", "rapid-transfer:")


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3}])
def test_transfer_accepts_more_than_the_same_drafts_would(llm, settings):
    asked = SamplingParams(max_tokens=24, ignore_eos=True, **{"acceptance": "max", **settings})
    prompts = [[(token * step) % 140 + 2 for token in PROMPT] for step in range(1, 13)]
    accepted = {
        spec: sum(each.choices[0].statistics.accepted for each in llm.generate(prompts, asked, spec))
        for spec in (SHORT, f"{TRANSFER},eta=20")
    }
    assert accepted[f"{TRANSFER},eta=20"] > accepted[SHORT]


def test_transfer_keeps_to_constraints_and_ends(llm):
    asked = SamplingParams(
        max_tokens=12, ignore_eos=True, logit_bias={token: -float("inf") for token in range(40, 150)}
    )
    for settings in (asked, SamplingParams(**{**vars(asked), "temperature": 1.0, "seed": 5})):
        (got,) = llm.generate([PROMPT], settings, TRANSFER)
        assert len(got.token_ids) == 12 and max(got.token_ids) < 40


def test_a_lossy_method_stands_alone(llm):
    with pytest.raises(UserError, match="rapid-transfer"):
        llm.generate([PROMPT], SamplingParams(max_tokens=2), f"ngram+{TRANSFER}")
