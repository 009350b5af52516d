"""Context policies beside every drafter: caches that are no plain memory, groups of layers with slots of their own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from cases import KINDS, PROMPTS, SPECS, params
from torch import Tensor

from hasten import LLM
from hasten.cache import Cache, GroupCache, SlotCache
from hasten.engine import ContextPolicy, Engine, Limits, Request
from hasten.errors import UserError
from hasten.model.layout import Group, Layout
from hasten.model.native.library import LIBRARY

NUMBERS = list(range(3, len(PROMPTS), 8))
WORK = [(number, list(KINDS)[index % len(KINDS)]) for index, number in enumerate(NUMBERS)]
BACKENDS = ["torch", *(["native"] if LIBRARY.exists() else [])]
WINDOW, SLACK = 9, 4


class Opaque(SlotCache):
    """Only it can attend: the native step must ask."""

    def memory(self) -> None:  # type: ignore[override]
        return None


class Rounded(Opaque):
    """Keys and values are whole numbers."""

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        super().write(layer, keys.round(), values.round())


class Recent(Opaque):
    """What a window of positions sees; what it no longer can see goes, some slots at a time."""

    most = 0

    def attend(
        self, layer: int, queries: Tensor, mask: Tensor | Literal["all"] | None, window: int | None
    ) -> tuple[Tensor, Tensor]:
        return super().attend(layer, queries, mask, WINDOW)

    def commit(self, rows: Sequence[int]) -> None:
        super().commit(rows)
        positions = torch.cat(
            [block.positions[:length] for block, length in SlotCache.memory(self)] or [torch.empty(0)]
        )
        gone = (positions <= positions.max() + 1 - WINDOW).nonzero().flatten().tolist() if len(positions) else []
        if len(gone) > SLACK:
            # Where there is no room to copy what choices share, they keep it.
            with suppress(UserError):
                self.evict(gone)
        Recent.most = max(Recent.most, self.length)


class SecondLayer(ContextPolicy):
    """The second layer's slots are kept in a way of their own."""

    def __init__(self, llm: LLM, kind: type[SlotCache]) -> None:
        layers = llm.model.config.layers
        groups = [Group((number,), layer.slots) for number, layer in enumerate(layers)]
        self.layout, self.kind = Layout(layers, groups), kind

    def group_cache(self, cache: Cache, group: Group) -> GroupCache:
        return self.kind(cache, group) if group.layers == (1,) else SlotCache(cache, group)


@pytest.fixture(scope="module")
def load(tiny: Path) -> Any:
    @cache
    def make(backend: str) -> LLM:
        return LLM(tiny, dtype="float32", backend=backend)

    return make


def engine(llm: LLM, **limits: int) -> Engine:
    return Engine(llm.model, llm.tokenizer, llm.engine.end_ids, Limits(**limits), str(llm.folder))


def decode(made: Engine, policy: ContextPolicy, spec: str, work: Sequence[tuple[int, str]] = WORK) -> list[list[int]]:
    requests = [made.add(PROMPTS[number], params(number, kind), spec, context=policy)[0] for number, kind in work]
    for _ in made.run():
        pass
    assert made.cache.used_bytes == 0
    return [request.output for request in requests]


@pytest.fixture(scope="module")
def expected(load: Any) -> dict[tuple[str, type], list[list[int]]]:
    """Plain decoding's answers, each alone."""
    return {
        (backend, kind): [
            decode(engine(load(backend)), SecondLayer(load(backend), kind), "plain", [job])[0] for job in WORK
        ]
        for backend in BACKENDS
        for kind in (Opaque, Rounded, Recent)
    }


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_drafter(load: Any, expected: Any, backend: str, spec: str) -> None:
    llm, kind = load(backend), (Rounded, Recent)[len(spec) % 2]
    assert decode(engine(llm, rows=24), SecondLayer(llm, kind), spec) == expected[backend, kind]


@pytest.mark.parametrize("backend", BACKENDS)
def test_who_attends_does_not_matter(load: Any, expected: Any, backend: str) -> None:
    """The same slots, attended by their cache, give the tokens of the default cache; rounded ones do not."""
    plain = [decode(engine(load(backend)), ContextPolicy(), "plain", [job])[0] for job in WORK]
    assert expected[backend, Opaque] == plain
    assert expected[backend, Rounded] != plain


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_by_eviction_is_a_window(load: Any, expected: Any, backend: str) -> None:
    """As with a model whose second layer has that window; and its group never has more slots than it sees."""
    llm = load(backend)
    layers = llm.model.config.layers
    narrow = replace(llm.model.config, layers=(layers[0], replace(layers[1], window=WINDOW), *layers[2:]))
    model = replace(llm.model, config=narrow)
    made = Engine(model, llm.tokenizer, llm.engine.end_ids, None, str(llm.folder))
    assert [decode(made, ContextPolicy(), "plain", [job])[0] for job in WORK] == expected[backend, Recent]
    assert expected[backend, Recent] != expected[backend, Opaque]
    Recent.most = 0
    decode(engine(llm, rows=5), SecondLayer(llm, Recent), "suffix")
    longest = max(len(PROMPTS[number]) for number, _ in WORK)
    assert WINDOW <= Recent.most <= WINDOW + SLACK < longest


@pytest.mark.skipif("native" not in BACKENDS, reason="no native library")
def test_neighbours_keep_their_bits(load: Any) -> None:
    """Beside requests whose cache attends by itself, a plain one gets the log-probabilities that it gets alone."""
    llm = load("native")
    (number, kind), *others = WORK
    logprobs = []
    for made, beside in ((engine(llm), []), (engine(llm), others)):
        request = made.add(PROMPTS[number], params(number, kind))[0]
        for other, own in beside:
            made.add(PROMPTS[other], params(other, own), context=SecondLayer(llm, Rounded))
        for _ in made.run():
            pass
        logprobs.append(request.logprobs)
    assert logprobs[0] == logprobs[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_choices_preemption_and_abort(load: Any, backend: str) -> None:
    """Choices share a prompt's slots until one evicts; a full cache has requests read again; nothing is left."""
    llm = load(backend)
    work = [(PROMPTS[number], replace(params(number, "sampled"), n=3)) for number in NUMBERS]
    policy = SecondLayer(llm, Recent)
    roomy = engine(llm)
    expected = [[each.output for each in ran] for ran in ran_all(roomy, work, policy)]
    tight = Engine(
        llm.model, llm.tokenizer, llm.engine.end_ids, None, str(llm.folder), roomy.cache.sequence_bytes(64) * 3
    )
    ran = ran_all(tight, work, policy)
    assert [[each.output for each in group] for group in ran] == expected
    assert any(each.statistics.prompt_rows > each.prompt_length for group in ran for each in group)
    (request,) = tight.add(PROMPTS[3], params(3, "greedy"), context=policy)
    tight.step()
    tight.abort(request)
    assert tight.cache.used_bytes == roomy.cache.used_bytes == 0


def ran_all(made: Engine, work: Sequence[tuple[list[int], Any]], policy: ContextPolicy) -> list[list[Request]]:
    groups = [made.add(prompt, own, "suffix", context=policy) for prompt, own in work]
    for _ in made.run():
        pass
    return groups


class Halved(ContextPolicy):
    """A prompt reducer: every other token of the prompt."""

    def reduce(self, prompt: Any) -> Any:
        return prompt[::2]


def test_a_reduced_prompt_is_what_is_read(load: Any) -> None:
    llm = load("torch")
    (number, kind), *_ = WORK
    made = engine(llm)
    whole = made.add(PROMPTS[number][::2], params(number, kind))[0]
    reduced = made.add(PROMPTS[number], params(number, kind), context=Halved())[0]
    for _ in made.run():
        pass
    assert (reduced.output, reduced.prompt_length) == (whole.output, whole.prompt_length)


def test_what_cannot_be_combined(load: Any) -> None:
    llm = load("torch")
    with pytest.raises(UserError, match="suffix is a drafter, not a cache policy or a prompt reducer"):
        engine(llm).add([1, 2], params(0, "greedy"), context="suffix")
