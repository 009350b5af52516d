"""What a request returns depends neither on neighbours nor on limits; ended requests leave nothing behind."""

from __future__ import annotations

from functools import cache

import pytest
from cases import INDEPENDENT, KINDS, MAX_TOKENS, PROMPTS, SPECS, params

from hasten import LLM, SamplingParams
from hasten.engine import Limits
from helpers import same

NUMBERS = list(range(1, len(PROMPTS), 4))
WORK = [(number, list(KINDS)[index % len(KINDS)], SPECS[index % len(SPECS)]) for index, number in enumerate(NUMBERS)]


def decode(llm, work, **changes):
    """All of the work in one batch: its completions."""
    generations = llm.generate(
        [PROMPTS[number] for number, _, _ in work],
        [params(number, kind, **changes) for number, kind, _ in work],
        [spec for _, _, spec in work],
    )
    return [generation.choices[0] for generation in generations]


@pytest.fixture(scope="module")
def limited(tiny):
    """An LLM with limits, loaded once."""
    return cache(lambda **limits: LLM(tiny, dtype="float32", limits=Limits(**limits)))


@pytest.mark.parametrize(
    "limits", [{"rows": 1}, {"rows": 7}, {"rows": 64}, {"sequences": 1}, {"sequences": 3, "rows": 5}]
)
def test_limits(limited, plain, limits):
    llm = limited(**limits)
    for (number, kind, _), completion in zip(WORK, decode(llm, WORK), strict=True):
        same(completion, plain(number, kind))
    assert llm.engine.cache.used_bytes == 0


@pytest.mark.parametrize("acceptance", ["match", "max", "typical"])
def test_company(llm, acceptance):
    """The same figures, too: tokens, steps, what was proposed and accepted."""
    work = [(number, kind, INDEPENDENT[index % len(INDEPENDENT)]) for index, (number, kind, _) in enumerate(WORK)]
    together = decode(llm, work, acceptance=acceptance)
    reversed_order = decode(llm, work[::-1], acceptance=acceptance)[::-1]
    for index, completion in enumerate(together):
        same(reversed_order[index], completion)
        alone = decode(llm, work[index : index + 1], acceptance=acceptance)[0]
        same(alone, completion)
        for other in (alone, reversed_order[index]):
            assert other.statistics.accepted_per_step == completion.statistics.accepted_per_step
            assert other.statistics.proposed == completion.statistics.proposed


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_abort_leaves_others_alone(llm, plain, steps):
    engine = llm.engine
    requests = [engine.add(PROMPTS[number], params(number, kind), spec)[0] for number, kind, spec in WORK]
    for _ in range(steps):
        engine.step()
    for request in requests[::2]:
        engine.abort(request)
        engine.abort(request)
    for progress in engine.run():
        assert progress.request.finish_reason != "abort"
    for (number, kind, _), request in list(zip(WORK, requests, strict=True))[1::2]:
        expected = plain(number, kind)
        assert (request.output, request.finish_reason) == (expected.token_ids, expected.finish_reason)
    for request in requests[::2]:
        assert request.finish_reason is not None
    assert not engine.busy
    assert engine.cache.used_bytes == 0
    for spec in SPECS:
        drafter = engine.drafter(spec)[1]
        assert getattr(drafter, "cache", engine.cache).used_bytes == 0


@pytest.mark.parametrize("spec", SPECS)
def test_closed_streams_free_their_memory(llm, spec):
    asked = SamplingParams(max_tokens=50, temperature=0.8, seed=1, n=3, ignore_eos=True)
    for read in (0, 1, 4):
        stream = llm.stream(PROMPTS[10], asked, spec)
        for _ in range(read):
            next(stream)
        stream.close()
        assert llm.engine.cache.used_bytes == 0
        assert not llm.engine.busy


@pytest.fixture(scope="module")
def four(llm):
    """Four choices of one prompt, by plain decoding."""
    asked = params(22, "sampled", n=4)
    return asked, llm.generate([PROMPTS[22]], asked, "plain")[0].choices


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("limits", [{}, {"sequences": 2, "rows": 4}])
def test_aborted_choices_leave_their_siblings_alone(limited, four, limits, spec):
    """The choice that reads the prompt for the others may be the one that goes, at any time."""
    llm, (asked, expected) = limited(**limits), four
    for steps in (0, 1, 2, 6):
        requests = llm.engine.add(PROMPTS[22], asked, spec)
        for _ in range(steps):
            llm.engine.step()
        llm.engine.abort(requests[0])
        llm.engine.step()
        llm.engine.abort(requests[1])
        for _ in llm.engine.run():
            pass
        for request, choice in list(zip(requests, expected, strict=True))[2:]:
            assert request.output == choice.token_ids
        assert llm.engine.cache.used_bytes == 0


def test_more_choices_than_places(llm, limited):
    tight = limited(sequences=2, rows=8)
    asked = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.8, seed=5, n=7)
    expected = llm.generate([PROMPTS[40], PROMPTS[41]], asked, "plain")
    for spec in SPECS:
        got = tight.generate([PROMPTS[40], PROMPTS[41]], asked, spec)
        for mine, theirs in zip(got, expected, strict=True):
            for one, other in zip(mine.choices, theirs.choices, strict=True):
                same(one, other)
        assert tight.engine.cache.used_bytes == 0
