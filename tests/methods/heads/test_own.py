"""Which heads a target has, and that `auto` asks the best of them beside what needs no training."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hasten import LLM, SamplingParams
from hasten.engine import Engine, Target, registry
from hasten.engine.drafting.cost import VerifyCost
from hasten.methods.drafters import auto
from hasten.methods.drafters.auto import Auto, AutoParameters, with_own
from hasten.methods.heads.hydra import Hydra
from hasten.methods.heads.own import best_head, own_heads, promised


@pytest.fixture
def another(llm: LLM, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    """A target beside which there are heads of medusa, and better ones of another method of the family."""
    shutil.copytree(tiny, tmp_path / "model")
    folder = tmp_path / "model" / "heads"
    shutil.copytree(folder / "medusa", folder / "wiser")
    config = json.loads((folder / "wiser" / "config.json").read_text())
    (folder / "wiser" / "config.json").write_text(json.dumps(config | {"accuracy": [0.8, 0.7, 0.6]}))
    medusa = registry.find("medusa")

    def beside(target: Target) -> dict[str, Any]:
        return {"head": str(folder / "wiser")} if target.folder == str(tmp_path / "model") else {}

    wiser = replace(medusa, slug="wiser", defaults=beside)
    monkeypatch.setitem(registry._METHODS, "wiser", wiser)
    return Target(llm.model, llm.tokenizer, str(tmp_path / "model"), frozenset(llm.engine.end_ids))


def test_the_best_head_is_a_candidate(another: Target):
    heads = own_heads(another)
    assert {"medusa", "wiser"} <= heads.keys()
    assert promised(heads["medusa"]) == pytest.approx(0.6 + 0.6 * 0.4 + 0.6 * 0.4 * 0.3)
    assert promised(heads["wiser"]) == pytest.approx(0.8 + 0.8 * 0.7 + 0.8 * 0.7 * 0.6)
    assert best_head(another) == "wiser"
    assert with_own(another) == {"candidates": "suffix/wiser:sized=false"}


@pytest.mark.parametrize("accuracy", [None, [], "much", [[]], [["a"]], {"1": 2}])
def test_a_card_that_does_not_say_promises_nothing(tmp_path: Path, accuracy: Any):
    (tmp_path / "config.json").write_text(json.dumps({} if accuracy is None else {"accuracy": accuracy}))
    assert promised(tmp_path) == 0


def test_without_heads_auto_is_as_it_was(llm: LLM, tmp_path: Path):
    for folder in (None, str(tmp_path)):
        target = Target(llm.model, llm.tokenizer, folder)
        assert own_heads(target) == {} and best_head(target) is None
        assert with_own(target) == {"candidates": "suffix"}
        assert Auto(target, AutoParameters()).taps == ()


def test_auto_asks_the_head(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    """Of the target's tokens more than one a step come, and all are those of plain decoding."""
    monkeypatch.setattr(
        auto, "verify_cost", lambda model, folder: VerifyCost((1, 2, 64), (64,), ((1, 1.001, 1.01),), 0)
    )
    prompts = [[2, 3, 4] * 3, list(range(10, 30))]
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    assert with_own(llm.engine.target) == {
        "candidates": f"suffix/{best_head(llm.engine.target)}:sized=false/draft-model"
    }
    engine = Engine(llm.model, llm.tokenizer, llm.engine.end_ids, folder=str(llm.folder), prefix_bytes=1 << 24)
    asked, accepted = [0], 0
    draft = Hydra.draft

    def counted(self: Hydra, *arguments: Any) -> Any:
        asked[0] += 1
        return draft(self, *arguments)

    monkeypatch.setattr(Hydra, "draft", counted)
    for expected in llm.generate(prompts, params, "plain"):
        (request,) = engine.add(expected.prompt_token_ids, params, "auto:candidates=suffix/hydra:sized=false")
        for _ in engine.run():
            pass
        assert request.output == expected.token_ids
        accepted += request.statistics.accepted
    assert accepted > 5 and asked[0] > 5


def test_a_head_that_looks_at_the_last_row_finds_prompts_in_the_cache(llm: LLM):
    engine = Engine(llm.model, llm.tokenizer, llm.engine.end_ids, folder=str(llm.folder), prefix_bytes=1 << 24)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompt = list(range(2, 40))
    outputs = []
    for _ in range(2):
        (request,) = engine.add(prompt, params, "medusa")
        for _ in engine.run():
            pass
        outputs.append(request.output)
    assert outputs[0] == outputs[1] and request.statistics.recalled_rows == len(prompt) - 1
    assert request.statistics.proposed > 0
