"""Prompts that begin alike are read once, though they come together: the same tokens, whoever waits for whom."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten import LLM, SamplingParams
from hasten.engine import Draft, Engine, Limits
from hasten.engine.beginnings import LEAST
from hasten.engine.job import Job
from hasten.model.native.library import LIBRARY
from helpers import Scripted

BACKENDS = ["torch", *(["native"] if LIBRARY.exists() else [])]
SHARED = [2 + number * 7 % 140 for number in range(100)]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.8, seed=4)


def prompt(number: int, shared: int = 100, own: int = 9) -> list[int]:
    return SHARED[:shared] + [3 + (number * 11 + place * 5) % 140 for place in range(own)]


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest, tiny: Path) -> LLM:
    return LLM(tiny, dtype="float32", backend=request.param)


def sharing(llm: LLM, slots: int = 100_000, **limits: int) -> Engine:
    """An engine that keeps texts, whose cache has so many slots."""
    slot = llm.engine.cache.sequence_bytes(64) // 64
    bounds = Limits(**limits)
    return Engine(llm.model, llm.tokenizer, llm.engine.end_ids, bounds, str(llm.folder), slot * slots, slot * slots)


def finish(engine: Engine) -> None:
    for _ in engine.run():
        pass
    while engine.prefixes.evict():
        pass
    assert engine.cache.used_bytes == engine.prefixes.used_bytes == 0


def read(*requests: Job) -> list[int]:
    return [request.statistics.prompt_rows for request in requests]


@pytest.mark.parametrize("method", ["plain", "ngram", "draft-model"])
@pytest.mark.parametrize("rows", [1024, 30])
def test_a_crowd_reads_once(model: LLM, method: str, rows: int) -> None:
    prompts = [prompt(number) for number in range(6)]
    expected = [each.token_ids for each in model.generate(prompts, PARAMS)]
    engine = sharing(model, rows=rows)
    requests = [engine.add(each, PARAMS, method)[0] for each in prompts]
    first, *others = requests
    engine.scheduler.plan()
    assert all(each.forerunner is first and each.sequence.nbytes() == 0 for each in others)
    finish(engine)
    assert [request.output for request in requests] == expected
    assert read(first) == [109] and all(count <= 9 for count in read(*others))
    assert all(each.statistics.recalled_rows + count == 109 for each, count in zip(others, read(*others), strict=True))


def test_who_comes_later_begins_at_once(model: LLM) -> None:
    """Behind what a request that decodes has read."""
    engine = sharing(model)
    first = engine.add(prompt(0), PARAMS)[0]
    engine.step()
    second = engine.add(prompt(1), PARAMS)[0]
    engine.scheduler.plan()
    assert (second.forerunner, second.read >= 100) == (None, True)
    finish(engine)
    expected = model.generate([prompt(0), prompt(1)], PARAMS)
    assert [first.output, second.output] == [each.token_ids for each in expected]


def test_a_tree_of_prompts(model: LLM) -> None:
    """Who shares more with one that waits itself waits for that one; a few tokens are no reason to."""
    long = [SHARED + [5, 9] * 40 + [own] * 3 for own in (20, 30)]
    prompts = [prompt(0), *long, [*prompt(0)[:103], 7, 7, 8], [7] * 40 + SHARED]
    engine = sharing(model, rows=50)
    requests = [engine.add(each, PARAMS)[0] for each in prompts]
    engine.scheduler.plan()
    waits = [(requests.index(each.forerunner), each.common) for each in requests if each.forerunner is not None]
    assert waits == [(0, 100), (1, 180), (0, 103)]
    finish(engine)
    assert [each.output for each in requests] == [each.token_ids for each in model.generate(prompts, PARAMS)]
    assert read(*requests) == [109, 83, 3, 3, 140]


def test_little_in_common_is_not_waited_for(model: LLM) -> None:
    engine = sharing(model)
    first = engine.add(prompt(0), PARAMS)[0]
    short, enough = (engine.add(prompt(1, shared), PARAMS)[0] for shared in (LEAST - 1, LEAST))
    other = engine.add(prompt(1), SamplingParams(max_tokens=3, tenant="other"))[0]
    engine.scheduler.plan()
    assert [each.forerunner for each in (first, short, other)] == [None] * 3
    assert enough.forerunner is first
    finish(engine)


def test_who_must_see_the_whole_prompt_reads_it(model: LLM) -> None:
    """Taps, log-probabilities of the prompt; others may begin behind them all the same."""
    tapped = Scripted(lambda request: Draft())
    tapped.taps = (("output", 0),)  # type: ignore[assignment]
    asked = SamplingParams(max_tokens=2, prompt_logprobs=1)
    engine = sharing(model)
    requests = [
        engine.add(prompt(0), PARAMS, tapped)[0],
        engine.add(prompt(1), asked)[0],
        engine.add(prompt(2), PARAMS)[0],
    ]
    engine.scheduler.plan()
    assert [each.forerunner for each in requests] == [None, None, requests[0]]
    finish(engine)
    assert read(*requests) == [109, 109, 9]
    assert len(requests[1].prompt_logprobs) == 109


def test_choices_of_those_who_wait(model: LLM) -> None:
    asked = SamplingParams(max_tokens=9, ignore_eos=True, temperature=1, seed=2, n=3)
    expected = [[each.token_ids for each in one.choices] for one in model.generate([prompt(0), prompt(1)], asked)]
    engine = sharing(model, rows=40)
    requests = [engine.add(prompt(number), asked) for number in (0, 1)]
    finish(engine)
    assert [[each.output for each in choices] for choices in requests] == expected
    assert read(*requests[0], *requests[1]) == [109, 0, 0, 9, 0, 0]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("choices", [1, 2])
def test_the_forerunner_is_aborted(model: LLM, steps: int, choices: int) -> None:
    """What it has read is kept; another choice of its prompt, or the oldest of those who wait, reads on."""
    expected = [each.token_ids for each in model.generate([prompt(number) for number in range(4)], PARAMS)]
    engine = sharing(model, rows=40)
    asked = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.8, seed=4, n=choices)
    first, *siblings = engine.add(prompt(0), asked)
    others = [engine.add(prompt(number), PARAMS)[0] for number in (1, 2, 3)]
    for _ in range(steps):
        engine.step()
    engine.abort(first)
    finish(engine)
    assert [request.output for request in others] == expected[1:]
    # Of 40 tokens that were kept, so many are left that it does not pay to wait.
    left = {0: [109, 9, 9], 1: [69] * 3, 2: [29] * 3}
    assert read(*others) == ([9] * 3 if siblings else left.get(steps, [9] * 3))
    if siblings:
        assert siblings[0].finish_reason == "length"


def test_those_who_wait_are_aborted(model: LLM) -> None:
    engine = sharing(model, rows=40)
    first, second, third = (engine.add(prompt(number), PARAMS)[0] for number in range(3))
    engine.abort(second)
    engine.step()
    engine.abort(third)
    finish(engine)
    assert (second.finish_reason, third.finish_reason, len(first.output)) == ("abort", "abort", 12)


@pytest.mark.parametrize("slots", [180, 260, 400, 700])
@pytest.mark.parametrize("sequences", [2, 8])
def test_a_tight_cache_changes_nothing(model: LLM, slots: int, sequences: int) -> None:
    """Nobody waits for one that waits for it."""
    prompts = [prompt(number, shared, 5 * number + 1) for number, shared in enumerate((100, 100, 80, 64, 100, 30, 90))]
    expected = [each.token_ids for each in model.generate(prompts, PARAMS)]
    engine = sharing(model, slots, sequences=sequences, rows=25)
    requests = [engine.add(each, PARAMS)[0] for each in prompts]
    for _ in engine.run():
        assert engine.cache.used_bytes <= engine.cache.limit_bytes
    finish(engine)
    assert [request.output for request in requests] == expected


def test_who_is_held_back_is_not_waited_for(model: LLM) -> None:
    rationed = Scripted(lambda request: Draft())
    rationed.rations = True
    engine = sharing(model)
    requests = [engine.add(prompt(0), PARAMS, rationed)[0], engine.add(prompt(1), PARAMS)[0]]
    requests.append(engine.add(prompt(2), PARAMS, rationed)[0])
    engine.scheduler.plan()
    assert [each.forerunner for each in requests] == [None] * 3
    finish(engine)


def test_cold_warm_and_evicted(model: LLM) -> None:
    prompts = [prompt(number) for number in range(3)]
    expected = [each.token_ids for each in model.generate(prompts, PARAMS)]
    engine = sharing(model)
    for recalled in (0, 100, 0):
        requests = [engine.add(each, PARAMS)[0] for each in prompts]
        for _ in engine.run():
            pass
        assert [each.output for each in requests] == expected
        assert (requests[0].statistics.recalled_rows >= 100) == bool(recalled)
        if recalled:
            while engine.prefixes.evict():
                pass
    finish(engine)


def test_texts_count_what_they_share_once(model: LLM) -> None:
    engine = sharing(model)
    for number in range(4):
        engine.add(prompt(number), PARAMS)
    for _ in engine.run():
        pass
    assert len(engine.prefixes) == 4
    assert engine.prefixes.used_bytes == engine.cache.used_bytes
    finish(engine)
