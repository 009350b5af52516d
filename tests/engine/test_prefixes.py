"""Prompts that begin as an earlier text are read from there on: the same tokens, cold, warm and evicted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten import LLM, SamplingParams, UserError
from hasten.cache import Cache, Prefixes
from hasten.engine import Draft, Engine, Limits
from hasten.model.native.library import LIBRARY
from helpers import Scripted, same

BACKENDS = ["torch", *(["native"] if LIBRARY.exists() else [])]
TEXT = "the cat and the moon sing in the garden when another morning reads the stars and dances on water"
METHODS = ["plain", "ngram", "suffix:max_requests=0", "token-recycling:shared=false,nodes=16", "draft-model", "dyspec"]


@pytest.fixture(scope="module", params=BACKENDS)
def pair(request: pytest.FixtureRequest, tiny: Path) -> tuple[LLM, LLM]:
    """The same model without and with room for prefixes."""
    cold, warm = (LLM(tiny, dtype="float32", backend=request.param, prefix_bytes=size) for size in (None, "8MiB"))
    return cold, warm


@pytest.mark.parametrize("method", METHODS)
def test_a_conversation(pair: tuple[LLM, LLM], method: str) -> None:
    """Each turn goes on from the last; only what is new is read."""
    cold, warm = pair
    turns, texts = [TEXT[:40], " and then", " the moon", " sings"], [[], []]
    for number, turn in enumerate(turns):
        asked = SamplingParams(
            max_tokens=14, ignore_eos=True, temperature=0.9 * (number % 2), seed=3, logprobs=1, tenant=method
        )
        answers = []
        for llm, text in zip(pair, texts, strict=True):
            text += llm.encode(turn)
            answers.append(llm.generate([text], asked, method)[0].choices[0])
            text += answers[-1].token_ids
        same(answers[1], answers[0])
        read, recalled = (getattr(answers[1].statistics, name) for name in ("prompt_rows", "recalled_rows"))
        assert answers[0].statistics.recalled_rows == 0
        if number:
            # All but the last token of the answer before, which no pass has read.
            assert read == len(warm.encode(turn)) + 1
            assert recalled == len(texts[1]) - len(answers[1].token_ids) - read
    assert cold.engine.cache.used_bytes == 0
    assert warm.engine.cache.used_bytes == warm.engine.prefixes.used_bytes > 0


def test_stops_within_an_accepted_draft(pair: tuple[LLM, LLM]) -> None:
    """What was accepted behind the end is not part of the text."""
    cold, warm = pair
    asked = SamplingParams(max_tokens=30, ignore_eos=True)
    prompt = cold.encode(TEXT)
    whole = cold.generate([prompt], asked)[0].token_ids
    drafter = Scripted(lambda request: Draft.chain(whole[len(request.output) :][:9]))
    # The oracle of a drafter is cut by the budget; a stop string is not known beforehand.
    stop = cold.tokenizer.decode(whole[:12])[-4:]
    ended = SamplingParams(max_tokens=30, ignore_eos=True, stop=(stop,))
    first = warm.generate([prompt], ended, drafter)[0]
    assert first.token_ids == cold.generate([prompt], ended)[0].token_ids
    again = warm.generate([prompt + whole[:20]], asked)[0]
    assert again.token_ids == cold.generate([prompt + whole[:20]], asked)[0].token_ids
    assert again.choices[0].statistics.recalled_rows >= len(prompt)


def test_tenants_share_nothing(pair: tuple[LLM, LLM]) -> None:
    _, warm = pair
    asked = [SamplingParams(max_tokens=4, tenant=tenant) for tenant in ("one", "two", "one")]
    rows = [warm.generate(TEXT + " once", each)[0].choices[0].statistics.recalled_rows for each in asked]
    assert rows[:2] == [0, 0]
    assert rows[2] > 16


def test_drafters_with_taps_read_everything(pair: tuple[LLM, LLM]) -> None:
    _, warm = pair
    warm.generate(TEXT, SamplingParams(max_tokens=2))
    drafter = Scripted(lambda request: Draft())
    drafter.taps = (("output", 0),)  # type: ignore[assignment]
    got = warm.generate(TEXT, SamplingParams(max_tokens=2), drafter)[0].choices[0].statistics
    assert (got.recalled_rows, got.prompt_rows) == (0, len(warm.encode(TEXT)))


def test_choices_and_batches(pair: tuple[LLM, LLM]) -> None:
    cold, warm = pair
    prompts = [TEXT[:60], TEXT[:60] + " on", TEXT, TEXT[:50]]
    asked = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1, seed=9, n=3)
    for _ in range(2):
        for mine, theirs in zip(warm.generate(prompts, asked), cold.generate(prompts, asked), strict=True):
            assert [each.token_ids for each in mine.choices] == [each.token_ids for each in theirs.choices]


@pytest.mark.parametrize("slots", [260, 330, 500])
def test_prefixes_give_way_to_requests(llm: LLM, slots: int) -> None:
    """A cache that is full forgets texts before anybody waits."""
    slot = llm.engine.cache.sequence_bytes(64) // 64
    engine = Engine(
        llm.model, llm.tokenizer, llm.engine.end_ids, Limits(rows=20), str(llm.folder), slot * slots, slot * slots
    )
    for number in range(6):
        prompts = [llm.encode(TEXT[: 30 + 9 * number]), llm.encode(TEXT[number:])]
        params = SamplingParams(max_tokens=60, ignore_eos=True, seed=number, temperature=0.7)
        requests = [engine.add(prompt, params, "ngram")[0] for prompt in prompts]
        for _ in engine.run():
            assert engine.cache.used_bytes <= slot * slots
        expected = [each.token_ids for each in llm.generate(prompts, params)]
        assert [request.output for request in requests] == expected
    assert len(engine.prefixes) > 0
    while engine.prefixes.evict():
        pass
    assert engine.cache.used_bytes == engine.prefixes.used_bytes == 0


def test_what_is_kept(llm: LLM) -> None:
    """The longer of two texts that begin alike, the latest of many, and none that is too short or too large."""
    cache = Cache(llm.model.config.layers, llm.model.cache_dtype, llm.model.device)
    size = cache.sequence_bytes(64)

    def text(*tokens: int) -> None:
        sequence = cache.sequence()
        sequence.reserve(400)
        sequence.begin(torch.arange(len(tokens)))
        sequence.commit(len(tokens))
        prefixes.keep("", tokens, sequence)

    prefixes = Prefixes(2 * size)
    text(*range(20))
    text(*range(30))
    text(*range(10), 99)
    assert (len(prefixes), prefixes.used_bytes, cache.used_bytes) == (1, size, size)
    assert prefixes.fork("", range(15)) is None
    assert prefixes.fork("other", range(30)) is None
    for tokens, length in ((range(17), 16), (range(40), 30), ([*range(20), 7, 7], 20)):
        fork = prefixes.fork("", list(tokens))
        assert fork is not None and fork.length == length
        fork.release()
    text(*range(100, 130))
    text(*range(200, 230))
    assert (len(prefixes), prefixes.fork("", range(40))) == (2, None)
    prefixes.limit_bytes = size - 1
    text(*range(300, 330))
    assert prefixes.evict() and prefixes.evict() and not prefixes.evict()
    assert cache.used_bytes == prefixes.used_bytes == 0


def test_sizes(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_PREFIX_BYTES", "3MiB")
    assert LLM(tiny).engine.prefixes.limit_bytes == 3 * 2**20
    with pytest.raises(UserError, match="prefix_bytes must be a size such as 64MiB"):
        LLM(tiny, prefix_bytes="some")
