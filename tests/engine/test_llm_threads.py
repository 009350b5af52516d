"""One model under many threads: their requests share batches, and each has the tokens that it has alone."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten import LLM, SamplingParams, UserError
from hasten.engine import Draft, creation
from hasten.engine.drafting import cost
from hasten.model import Decoder
from hasten.model.native.library import LIBRARY
from helpers import Scripted

THREADS, ROUNDS = 6, 5
WORDS = ["the cat and", "when another morning", "the moon sing in", "stars and dances", "on water", "reads the garden"]
METHODS = ["plain", "ngram", "suffix", "token-recycling", "draft-model", "copyspec+draft-model"]
NEEDS_NATIVE = pytest.mark.skipif(not LIBRARY.exists(), reason="the native step was not built: no C++ compiler")
BACKENDS = [pytest.param("native", marks=NEEDS_NATIVE), "torch"]


def asked(number: int, **changes: Any) -> SamplingParams:
    """Greedy or sampled, of unequal length."""
    sampled = {"temperature": 0.9, "seed": number} if number % 2 else {}
    return SamplingParams(**{"max_tokens": 6 + 5 * (number % 4), **sampled, **changes})


def streamed(llm: LLM, prompt: str, params: SamplingParams, method: str) -> list[int]:
    return [token for chunk in llm.stream(prompt, params, method) for token in chunk.token_ids]


def generated(llm: LLM, prompt: str, params: SamplingParams, method: str) -> list[int]:
    return llm.generate(prompt, params, method)[0].token_ids


def at_once(work: Sequence[Callable[[], Any]]) -> list[Any]:
    """Each in a thread of its own, from the same moment on."""
    start = threading.Barrier(len(work))

    def run(each: Callable[[], Any]) -> Any:
        start.wait()
        return each()

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(run, work))


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_thread_has_its_own_tokens(tiny: Path, backend: str) -> None:
    llm = LLM(tiny, dtype="float32", backend=backend)
    jobs = [
        (prompt, asked(number), method)
        for number, (prompt, method) in enumerate(zip(WORDS * ROUNDS, METHODS * ROUNDS, strict=True))
    ]
    expected = [generated(llm, *job) for job in jobs]
    ways = (generated, streamed)

    def share(number: int) -> list[list[int]]:
        return [ways[index % 2](llm, *jobs[index]) for index in range(number, len(jobs), THREADS)]

    got = at_once([lambda number=number: share(number) for number in range(THREADS)])
    for number in range(THREADS):
        assert got[number] == expected[number::THREADS]
    assert not llm.engine.busy
    assert llm.engine.cache.used_bytes == 0


def test_threads_share_batches(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, spans = LLM(tiny, dtype="float32"), []
    forward = Decoder.forward

    def counted(self: Decoder, rows: Any, *arguments: Any) -> torch.Tensor:
        spans.append(len(rows.spans))
        return forward(self, rows, *arguments)

    monkeypatch.setattr(Decoder, "forward", counted)
    at_once([lambda: llm.generate("the cat", asked(0, max_tokens=200, ignore_eos=True))] * 4)
    # Threads that took turns would need 800 passes; on a busy machine they do not start together.
    assert max(spans) > 1
    assert len(spans) < 700


def test_who_fails_fails_alone(tiny: Path) -> None:
    llm = LLM(tiny, dtype="float32")
    long = asked(0, max_tokens=40, ignore_eos=True)
    expected = generated(llm, "the moon", long, "plain")

    def fail(request: Any) -> Draft:
        if len(request.output) > 3:
            raise ValueError("a bug in a drafter")
        return Draft.chain([3])

    def broken(way: Callable[..., Any]) -> str:
        with pytest.raises(ValueError, match="a bug in a drafter"):
            way(llm, "the cat", long, Scripted(fail))
        return "failed"

    got = at_once(
        [
            *(lambda: generated(llm, "the moon", long, "plain"), lambda: broken(generated)),
            *(lambda: streamed(llm, "the moon", long, "ngram"), lambda: broken(streamed)),
        ]
    )
    assert got == [expected, "failed", expected, "failed"]
    assert llm.engine.cache.used_bytes == 0


def test_neighbours_of_one_drafter_outlive_the_one_that_it_fails_on(llm: LLM) -> None:
    """A batch is proposed for together, and the drafter says only that something is wrong."""
    prompts = [llm.encode(prompt) for prompt in WORDS]

    def fail(request: Any) -> Draft:
        if request.tokens[: request.prompt_length] == prompts[2]:
            raise ValueError("not this one")
        return Draft()

    drafter, params = Scripted(fail), asked(0, max_tokens=9, ignore_eos=True)
    requests = [llm.engine.add(prompt, params, drafter)[0] for prompt in prompts]
    while llm.engine.busy:
        llm.engine.step()
    expected = [generation.token_ids for generation in llm.generate(prompts, params, "plain")]
    for number, request in enumerate(requests):
        assert request.finish_reason == ("error" if number == 2 else "length")
        assert str(request.error or "") == ("not this one" if number == 2 else "")
        assert request.output == (expected[number][:1] if number == 2 else expected[number])


def test_interrupted_in_the_middle_of_a_step(tiny: Path) -> None:
    """The thread that steps is interrupted while it works for another one, which is told so; a third goes on."""
    llm, long = LLM(tiny, dtype="float32"), asked(0, max_tokens=40, ignore_eos=True)
    expected = generated(llm, "on water", long, "plain")
    engine, observed = llm.engine, Scripted(lambda request: Draft())
    stream = llm.stream("on water", long)
    first = next(stream)

    def interrupt(request: Any, seen: Any) -> None:
        if len(request.output) > 1:
            raise KeyboardInterrupt

    observed.observe = interrupt  # type: ignore[method-assign]
    other = llm.stream("the moon", long, observed)
    next(other)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("the cat", long)
    assert [*first.token_ids, *(token for chunk in stream for token in chunk.token_ids)] == expected
    with pytest.raises(UserError, match="interrupted in the middle of a step"):
        list(other)
    assert engine.cache.used_bytes == 0


def test_a_stream_that_the_garbage_collector_ends_within_a_step(tiny: Path) -> None:
    llm, long = LLM(tiny, dtype="float32"), asked(0, max_tokens=20, ignore_eos=True)
    expected = generated(llm, "the cat", long, "plain")

    def collect(request: Any) -> Draft:
        if held:
            circle: list[Any] = [held.pop()]
            circle.append(circle)
            del circle
            gc.collect()
        return Draft()

    held = [llm.stream("the moon", long)]
    next(held[0])
    assert llm.generate("the cat", long, Scripted(collect))[0].token_ids == expected
    assert held == []
    assert not llm.engine.busy
    assert llm.engine.cache.used_bytes == 0


@NEEDS_NATIVE
def test_models_with_unequal_threads_at_the_same_time(tiny: Path) -> None:
    """PyTorch's number of threads is each thread's own, and so is the team that runs its steps."""
    known = torch.get_num_threads()
    llms = [LLM(tiny, dtype="float32", backend="native") for _ in range(3)]
    long = asked(1, max_tokens=60, ignore_eos=True)
    expected = generated(llms[0], "the cat and", long, "plain")

    def work(number: int) -> list[list[int]]:
        outputs = []
        for count in range(8):
            torch.set_num_threads(1 + (number + count) % 2)
            outputs.append(generated(llms[number], "the cat and", long, "ngram"))
        return outputs

    try:
        got = at_once([lambda number=number: work(number) for number in range(3)])
    finally:
        torch.set_num_threads(known)
    assert got == [[expected] * 8] * 3


def test_models_that_share_a_drafter_at_the_same_time(tiny: Path) -> None:
    """Engines load a small model once between them; what it holds for a request is that engine's own."""
    llms = [LLM(tiny, dtype="float32") for _ in range(3)]
    assert len({id(llm.engine.drafter("draft-model")[1].model) for llm in llms}) == 1
    jobs = [(prompt, asked(number, ignore_eos=True), "draft-model") for number, prompt in enumerate(WORDS)]
    expected = [generated(llms[0], prompt, params, "plain") for prompt, params, _ in jobs]
    for _ in range(3):
        got = at_once([lambda llm=llm: [generated(llm, *job) for job in jobs] for llm in llms])
        assert got == [expected] * 3


@pytest.mark.parametrize("way", [generated, streamed])
def test_a_drafter_that_fails_at_the_end_keeps_nobody_waiting(tiny: Path, way: Callable[..., Any]) -> None:
    llm, drafter = LLM(tiny, dtype="float32"), Scripted(lambda request: Draft())

    def fail(request: Any) -> None:
        raise ValueError("no end")

    drafter.end = fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no end"):
        way(llm, "the cat", asked(0), drafter)
    assert llm.engine.cache.used_bytes == 0
    assert not llm.engine.busy


def test_no_stream_loses_its_end(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that looks while another one is ending its request waits until its last chunk is there."""
    llm = LLM(tiny, dtype="float32")
    short, long = asked(0), asked(0, max_tokens=300, ignore_eos=True)
    expected = generated(llm, "the cat and", short, "plain")
    ending, report = threading.Event(), llm.engine._progress

    def slow(request: Any, tokens: list[int], kinds: list[Any]) -> Any:
        if request.finish_reason is not None and request.unread is not None:
            ending.set()
            time.sleep(0.3)
        return report(request, tokens, kinds)

    monkeypatch.setattr(llm.engine, "_progress", slow)

    def read() -> list[int]:
        tokens: list[int] = []
        for chunk in llm.stream("the cat and", short):
            tokens += chunk.token_ids
            if len(tokens) == len(expected) - 1:
                assert ending.wait(20)
        return tokens

    got = at_once([read, lambda: generated(llm, "the moon", long, "plain")])
    assert got[0] == expected


def test_steps_do_not_wait_for_what_is_prepared(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread's drafter is loaded, the others' requests go on to their end."""
    loading, decoded = threading.Event(), threading.Event()

    def create(spec: str, target: Any) -> Any:
        if spec == "ngram:length=7":
            loading.set()
            assert decoded.wait(20), "nobody else was served meanwhile"
        return made(spec, target)

    made = creation.create
    monkeypatch.setattr(creation, "create", create)

    def other() -> list[int]:
        assert loading.wait(20)
        tokens = generated(llm, "the moon", asked(2), "suffix")
        decoded.set()
        return tokens

    slow, quick = at_once([lambda: generated(llm, "the cat and", asked(0), "ngram:length=7"), other])
    assert slow == generated(llm, "the cat and", asked(0), "plain")
    assert quick == generated(llm, "the moon", asked(2), "plain")


def test_measuring_is_no_part_of_a_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    stepping: list[bool] = []
    measured: list[bool] = []
    step, measure = llm.engine._step, cost.measure

    def counted() -> Any:
        stepping.append(True)
        try:
            return step()
        finally:
            stepping.pop()

    def looked(model: Any) -> Any:
        measured.append(bool(stepping))
        return measure(model)

    monkeypatch.setattr(llm.engine, "_step", counted)
    monkeypatch.setattr(cost, "measure", looked)
    monkeypatch.setattr(cost, "_read", lambda file: None)
    for method in ("auto:candidates=ngram", "ngram+auto:candidates=suffix"):
        generated(llm, "the cat and", asked(0), method)
    assert measured == [False, False]
