"""The search for a method, on a clock that the tests turn themselves: no timing, the same result every time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hasten import LLM, SamplingParams, UserError
from hasten.bench import tune as tuning
from hasten.bench.prompts import BenchPrompt
from hasten.bench.tune import TuneResult, default_candidates, settings, tune
from hasten.engine import Draft, Drafter, decoders
from hasten.engine.registry import Method, parse
from hasten.methods.heads.own import own_heads
from hasten.model import DiffusionConfig, ModelConfig, OracleModel

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


def prompts(count: int) -> list[BenchPrompt]:
    return [BenchPrompt("words", "words", f"the cat and the moon {number}", None) for number in range(count)]


class Silent(Drafter):
    def propose(self, request: Any, budget: int) -> Draft:
        return Draft()


@dataclass
class Stage:
    """What the search sees: lanes whose speed is a number per method, and a clock that they move."""

    now: float = 0.0
    rates: dict[str, float] | None = None
    runs: list[tuple[str, tuple[int, ...]]] | None = None
    interrupt_after: int | None = None


class FakeLane:
    """Decodes `rate` tokens per second of the stage's clock, a token a step, until six are out."""

    stage: Stage

    def __init__(self, llm: LLM, engine: Any, method: str, ids: Sequence[int], params: SamplingParams) -> None:
        self.method, self.tokens, self.seconds = method, [], 0.0
        self.request = type("Request", (), {"statistics": type("Numbers", (), {"tokens": 6, "steps": 3})})
        self.rate = self.stage.rates.get(method, 1.0)
        if isinstance(self.rate, dict):
            self.rate = self.rate.get(ids[-1], 1.0)
        self.stage.runs.append((method, tuple(ids)))

    @property
    def done(self) -> bool:
        return len(self.tokens) == 6

    def step(self) -> list[Any]:
        if self.stage.interrupt_after is not None and len(self.stage.runs) > self.stage.interrupt_after:
            raise KeyboardInterrupt
        self.tokens.append(0)
        self.seconds += 1 / self.rate
        self.stage.now += 1 / self.rate
        return []

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds if self.seconds else 0.0

    def abort(self) -> None:
        pass


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """The search on fake lanes and a fake clock; candidates `a` to `h` exist."""
    stage = Stage(rates={}, runs=[])
    lane = type("StagedLane", (FakeLane,), {"stage": stage})
    monkeypatch.setattr(tuning, "Lane", lane)
    monkeypatch.setattr(tuning, "warm_engines", lambda llm, names: dict.fromkeys(names))
    monkeypatch.setattr(tuning, "is_lossless", lambda name: name != "lossy")
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: stage.now)
    monkeypatch.setattr(tuning, "encode", lambda llm, items, params: [[place] for place in range(len(items))])
    return stage


def run(stage: Stage, names: str, count: int = 16, seconds: float = 1e6) -> TuneResult:
    return tune(None, prompts(count), PARAMS, seconds, list(names))  # type: ignore[arg-type]


def config_of(attention: str | None, alignment: str = "same") -> ModelConfig:
    """As far as the choice of candidates looks at it."""
    diffusion = None if attention is None else DiffusionConfig(attention, alignment, 7, 4)  # type: ignore[arg-type]
    return replace(OracleModel(lambda tokens: torch.zeros(8), 8).config, diffusion=diffusion)


def test_halving_finds_the_fastest_and_checks_it_on_other_prompts(stage: Stage):
    stage.rates = {"a": 0.5, "b": 1.1, "c": 3.0, "d": 2.0, "e": 0.9, "f": 1.0, "g": 1.5, "h": 2.5}
    result = run(stage, "abcdefgh")
    assert result.choice == "c" and result.expected == pytest.approx(3.0)
    assert [candidate.method for candidate in result.candidates[:3]] == ["c", "h", "d"]
    assert [candidate.rung for candidate in result.candidates] == [3, 3, 2, 2, 1, 1, 1, 1]
    # 8 of 16 prompts to choose on: 2 for all, 4 for the better half, 8 for the last two.
    assert [len(candidate.speedups) for candidate in result.candidates] == [8, 8, 4, 4, 2, 2, 2, 2]
    seen = {name: {ids for method, ids in stage.runs if method == name} for name in "ac"}
    assert seen["a"] < seen["c"] and len(seen["c"]) == 16
    assert result.held_out == 8 and not result.interrupted


def test_prompts_of_the_choice_and_of_the_check_are_disjoint(stage: Stage):
    stage.rates = {"a": 2.0, "b": 1.0}
    run(stage, "ab", count=7)
    chosen_on = {ids for method, ids in stage.runs if method == "b"}
    seen = [ids for method, ids in stage.runs if method == "a"]
    assert len(seen) == len(set(seen)) == 7
    assert len(set(seen) - chosen_on) == 3


def test_plain_if_nothing_beats_it(stage: Stage):
    stage.rates = {"a": 0.7, "b": 1.01}
    result = run(stage, "ab")
    assert (result.choice, result.expected, result.reason) == ("plain", 1.0, tuning.NO_GAIN)


def test_plain_if_the_gain_does_not_hold(stage: Stage):
    """Fast on the prompts it was chosen on, and on no others."""
    stage.rates = {"a": 2.0}
    run(stage, "a")
    chosen_on = [ids[0] for method, ids in stage.runs if method == "a"][:8]
    stage.rates, stage.runs = {"a": dict.fromkeys(chosen_on, 2.0)}, []
    result = run(stage, "a")
    assert result.choice == "plain" and result.expected == 1.0 and "held-out" in result.reason


def test_the_time_is_kept(stage: Stage):
    """Six tokens take six seconds a lane: there is time for a part of it only, and every candidate gets some."""
    stage.rates = dict.fromkeys("abcdefghijklmnop", 2.0)
    result = run(stage, "abcdefghijklmnop", count=100, seconds=120)
    assert result.seconds < 130
    assert all(candidate.rung >= 1 for candidate in result.candidates)
    assert result.choice != "plain" and result.held_out >= 1


def test_ctrl_c_tells_what_is_known(stage: Stage):
    stage.rates, stage.interrupt_after = {"a": 3.0, "b": 1.0}, 3 * 3
    result = run(stage, "ab")
    assert result.interrupted and result.choice == "a" and result.expected is None
    assert [len(candidate.speedups) for candidate in result.candidates] == [3, 3]
    stage.runs, stage.interrupt_after = [], 0
    result = run(stage, "ab")
    assert result.interrupted and result.choice == "plain" and result.reason == tuning.NOT_MEASURED
    assert result.document()["candidates"][0]["speedup"] is None


def test_what_lacks_something_is_skipped_unless_it_was_asked_for(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    tried: list[str] = []

    def load(llm: Any, names: Sequence[str]) -> dict[str, Any]:
        tried.extend(names)
        if names[0].startswith("b"):
            raise UserError("b needs a model")
        return dict.fromkeys(names)

    monkeypatch.setattr(tuning, "warm_engines", load)
    monkeypatch.setattr(tuning, "default_candidates", lambda config, heads: (["a", "b", *heads], {"c": "lossy"}))
    monkeypatch.setattr(tuning, "own_heads", lambda target: ["b:length=2"])
    llm = SimpleNamespace(model=SimpleNamespace(config=None), engine=SimpleNamespace(target=None))
    result = tune(llm, prompts(4), PARAMS, 1e6)
    assert result.skipped == {"b": "b needs a model", "c": "lossy"}
    assert [candidate.method for candidate in result.candidates] == ["a"]
    assert tried == ["plain", "a", "b"]
    with pytest.raises(UserError, match="b needs a model"):
        run(stage, "ab")


def test_too_few_prompts():
    with pytest.raises(UserError, match="at least 2 prompts"):
        tune(None, prompts(1), PARAMS)  # type: ignore[arg-type]


def test_default_candidates_come_from_the_registry():
    chosen, skipped = default_candidates(config_of(None))
    for name in chosen:
        method, _ = parse(name)
        assert method.exactness == "lossless" and not method.needs_training
    slugs = {name.partition(":")[0] for name in chosen}
    assert slugs | skipped.keys() == decoders().keys() - {"plain"}
    assert {"ngram", "ngram:length=5", "ngram:length=20"} <= set(chosen)
    assert all(len(list(group)) <= 3 for _, group in itertools.groupby(chosen, lambda name: name.partition(":")[0]))


def test_what_computes_beside_the_model_is_a_candidate_where_there_is_a_core(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning, "spare_cores", lambda: 0)
    chosen, skipped = default_candidates(config_of(None))
    assert "leave it one with --threads" in skipped["mirror-sd"]
    assert not any(name.startswith("mirror-sd") for name in chosen)
    monkeypatch.setattr(tuning, "spare_cores", lambda: 1)
    assert {"mirror-sd", "mirror-sd:length=3", "mirror-sd:length=14"} <= set(default_candidates(config_of(None))[0])


def test_heads_that_the_model_has_are_candidates(llm: LLM):
    assert "name it under --candidates" in default_candidates(llm.model.config)[1]["medusa"]
    chosen, skipped = default_candidates(llm.model.config, own_heads(llm.engine.target))
    assert {"medusa", "medusa:nodes=7", "medusa:nodes=30"} <= set(chosen) and "medusa" not in skipped


@pytest.mark.parametrize("attention", ["full", "block-causal"])
def test_canvases_have_candidates_of_their_own(attention: str):
    chosen, skipped = default_candidates(config_of(attention))
    assert chosen == ["freedave", "freedave:drafts=2", "freedave:drafts=8"]
    assert "lossy" in skipped["threshold"] and "kind" in skipped["ngram"]


def test_tidar_is_a_candidate_where_the_model_is_one():
    assert {"tidar", "ngram"} <= set(default_candidates(config_of("context-causal"))[0])
    assert "tidar" in default_candidates(config_of("context-causal", "shifted"))[1]


def test_settings_stay_within_a_methods_range():
    @dataclass(frozen=True)
    class Narrow:
        nodes: int = 4

        def __post_init__(self) -> None:
            if self.nodes > 4:
                raise UserError("nodes must be at most 4")

    def register(parameters: type[Any]) -> Method:
        return Method(
            *("narrow", "drafter", (), "drafters", "lossless", "", "", False, ""),
            *(parameters, lambda target, chosen: Silent()),
        )

    from hasten.engine import registry

    try:
        registry._METHODS["narrow"] = register(Narrow)
        assert settings(registry._METHODS["narrow"]) == ["narrow", "narrow:nodes=2"]
        registry._METHODS["narrow"] = register(dataclass(frozen=True)(type("Empty", (), {})))
        assert settings(registry._METHODS["narrow"]) == ["narrow"]
    finally:
        del registry._METHODS["narrow"]


def test_on_a_real_model(llm: LLM):
    """All parts together; which one is faster is not for a test to say."""
    result = tune(llm, prompts(4), PARAMS, 60.0, ["ngram", "ngram:length=3"])
    document = result.document()
    assert document["choice"] in ("plain", "ngram", "ngram:length=3")
    assert {entry["method"] for entry in document["candidates"]} == {"ngram", "ngram:length=3"}
    for entry in document["candidates"]:
        assert entry.keys() >= {"method", "speedup", "tokens_per_step", "prompts", "rung"}
        assert entry["speedup"] > 0 and entry["tokens_per_step"] >= 1 and entry["prompts"] == 2 and entry["rung"] == 1
    assert llm.engine.cache.used_bytes == 0
