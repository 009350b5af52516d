"""The card of a model: what it says was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hasten import LLM
from hasten.model.checkpoint import resolve
from hasten.tasks import TASKS
from hasten.train import card


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny", dtype="float32")


def test_perplexity_of_prose(llm: LLM):
    measured = card.perplexity(llm, chunks=3)
    # Knowing only how often each token occurs in prose gives about 300.
    assert 1 < measured < 150


def test_scores_count_held_out_examples(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(card, "TASKS", {name: TASKS[name] for name in ("copy", "reverse")})
    scores = card.task_scores(llm, per_task=4)
    assert scores.keys() == {"copy", "reverse"}
    for score in scores.values():
        assert 0 < score["right"] <= score["of"] == sum(of for _, of in score["by_length"].values()) == 4


@pytest.mark.parametrize("name", ["tiny", "tiny-draft"])
def test_shipped_cards_name_their_command_and_scores(name: str):
    folder = resolve(name)
    document = json.loads((folder / "card.json").read_text())
    assert document["command"].startswith("hasten train lm")
    assert document["tasks"].keys() == TASKS.keys()
    assert (folder / "README.md").read_text() == card.render(name, document)


def test_shipped_models_are_small():
    for name, limit in (("tiny", 16), ("tiny-draft", 4)):
        weights = sum(file.stat().st_size for file in Path(resolve(name)).glob("*.safetensors"))
        assert weights <= limit * 2**20
