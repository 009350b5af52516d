"""A cache with a limit: requests wait, make place for older ones and are read again; all have the tokens of plenty."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten import LLM, SamplingParams, UserError
from hasten.engine import Draft, Engine, Limits
from helpers import Scripted

WORDS = ["the cat and the moon", "when another morning", "the moon sing in the garden", "stars", "on water", "reads"]
METHODS = ["plain", "ngram", "token-recycling:shared=false,nodes=16", "draft-model", "plain", "suffix:max_requests=0"]
PARAMS = [
    SamplingParams(max_tokens=150, ignore_eos=True, temperature=0.8 * (number % 2), seed=number) for number in range(6)
]


@pytest.fixture(scope="module")
def plenty(llm: LLM) -> list[list[int]]:
    return [llm.generate(word, params)[0].token_ids for word, params in zip(WORDS, PARAMS, strict=True)]


def small(llm: LLM, slots: int, **limits: int) -> Engine:
    """An engine whose cache has so many slots."""
    cache_bytes = llm.engine.cache.sequence_bytes(64) // 64 * slots
    return Engine(llm.model, llm.tokenizer, llm.engine.end_ids, Limits(**limits), str(llm.folder), cache_bytes)


@pytest.mark.parametrize("slots", [256, 300, 420, 700, 1100])
def test_a_tight_cache_changes_nothing(llm: LLM, plenty: list[list[int]], slots: int) -> None:
    engine = small(llm, slots, rows=16)
    work = zip(WORDS, PARAMS, METHODS, strict=True)
    requests = [engine.add(llm.encode(word), params, method)[0] for word, params, method in work]
    for _ in engine.run():
        assert engine.cache.used_bytes <= engine.cache.limit_bytes
    assert [request.output for request in requests] == plenty
    assert engine.cache.used_bytes == 0


def test_who_is_preempted_is_read_again(llm: LLM, plenty: list[list[int]]) -> None:
    """The younger one makes place; its drafter is shown every token of the prompt once."""
    engine = small(llm, 256)
    drafter = Scripted(lambda request: Draft())
    drafter.headroom = lambda request: 20  # type: ignore[method-assign]
    requests = [engine.add(llm.encode(WORDS[number]), PARAMS[number], drafter)[0] for number in (0, 1)]
    waits = 0
    for _ in engine.run():
        waits += requests[1] in engine.scheduler.waiting
    assert waits > 0
    assert [request.output for request in requests] == plenty[:2]
    assert requests[1].statistics.prompt_rows > requests[1].prompt_length
    for request in requests:
        assert drafter.read[request.id] == [0]


def test_a_drafter_may_let_a_request_wait_that_runs(llm: LLM, plenty: list[list[int]]) -> None:
    """It gives back its slots, and has them again later; the others go on."""
    engine, asked, held = small(llm, 5000), [0, 0], []
    drafter = Scripted(lambda request: Draft())

    def admits(request):
        asked[request.id] += 1
        if request.id == 0 and asked[0] in range(5, 12):
            held.append(request.sequence.length)
            return False
        return True

    drafter.rations, drafter.admits = True, admits  # type: ignore[method-assign]
    requests = [engine.add(llm.encode(WORDS[number]), PARAMS[number], drafter)[0] for number in (0, 1)]
    list(engine.run())
    assert [request.output for request in requests] == plenty[:2]
    # Asked twice in the step in which it was held back: once more as one that waits.
    assert held[0] > 0 and set(held[1:]) == {0}
    assert requests[0].statistics.prompt_rows > requests[0].prompt_length
    assert asked[1] == requests[1].statistics.steps and engine.cache.used_bytes == 0


def test_a_request_that_never_may_go_on_fails_alone(llm: LLM, plenty: list[list[int]]) -> None:
    engine = small(llm, 5000)
    drafter = Scripted(lambda request: Draft())

    def admits(request):
        if request.id == 0 and len(request.output) > 9:
            raise UserError("no more")
        return True

    drafter.rations, drafter.admits = True, admits  # type: ignore[method-assign]
    requests = [engine.add(llm.encode(WORDS[number]), PARAMS[number], drafter)[0] for number in (0, 1)]
    while engine.busy:
        engine.step()
    assert (requests[0].finish_reason, str(requests[0].error)) == ("error", "no more")
    assert requests[0].output == plenty[0][:10] and requests[1].output == plenty[1]


def test_choices_of_one_prompt(llm: LLM) -> None:
    asked = SamplingParams(max_tokens=100, ignore_eos=True, temperature=1, seed=3, n=4)
    expected = [choice.token_ids for choice in llm.generate(WORDS[0], asked)[0].choices]
    engine = small(llm, 300)
    requests = engine.add(llm.encode(WORDS[0]), asked)
    for _ in engine.run():
        pass
    assert [request.output for request in requests] == expected


def test_what_never_fits_fails_alone(llm: LLM, plenty: list[list[int]]) -> None:
    engine = small(llm, 200)
    large, fits = engine.add([5] * 230, PARAMS[0])[0], engine.add(llm.encode(WORDS[3]), PARAMS[3])[0]
    while engine.busy:
        engine.step()
    assert large.finish_reason == "error"
    assert "the KV cache is full" in str(large.error)
    assert (fits.output, fits.finish_reason) == (plenty[3], "length")


def test_the_limit_is_an_option(tiny: Path, plenty: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert LLM(tiny, cache_bytes=100_000).engine.cache.limit_bytes == 100_000
    assert LLM(tiny, cache_bytes="2MiB").engine.cache.limit_bytes == 2 * 2**20
    monkeypatch.setenv("HASTEN_CACHE_BYTES", "1.5MB")
    limited = LLM(tiny, dtype="float32")
    assert limited.engine.cache.limit_bytes == 1_500_000
    assert [g.token_ids for g in limited.generate(WORDS, PARAMS)] == plenty
    with pytest.raises(UserError, match=r"cache_bytes must be a size such as 64MiB .* not 'much'"):
        LLM(tiny, cache_bytes="much")
