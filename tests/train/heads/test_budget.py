"""Runs that fit into their time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hasten import LLM, UserError
from hasten.train.heads import budget as module
from hasten.train.heads.budget import Budget, tokens_per_second
from hasten.train.heads.dialogues import Writing, write_dialogues
from hasten.train.heads.medusa import MedusaRecipe
from hasten.train.heads.recipe import DIALOGUES


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def recipe(folder: Path) -> MedusaRecipe:
    return MedusaRecipe(tokens=10**6, batch_tokens=256, heads=1, parent="tiny", data=str(folder))


def test_dialogues_end_when_their_share_is_over(llm: LLM, tmp_path: Path, clock: list[float]) -> None:
    budget = Budget(1.0, tmp_path / "run")
    file = tmp_path / DIALOGUES

    def spend(done: int) -> None:
        clock[0] += 15.0

    how = Writing(count=1000, answer=8)
    some = write_dialogues(llm, file, how, report=spend, enough=lambda: budget.talked)
    assert 0 < len(some) < 1000
    assert write_dialogues(llm, file, how, enough=lambda: True) == some
    assert len(write_dialogues(llm, file, replace(how), enough=lambda: len(file.read_text()) > 10**4)) > len(some)


@pytest.mark.parametrize("spent, tokens", [(0.0, 60 * 100), (30.0, 30 * 100), (58.0, int(0.35 * 60) * 100)])
def test_training_has_what_is_left(
    recipe, tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch, spent: float, tokens: int
) -> None:
    monkeypatch.setattr(module, "tokens_per_second", lambda recipe: 100.0)
    budget = Budget(1.0, tmp_path / "run")
    clock[0] += spent
    cut = budget.cut(recipe)
    assert cut == replace(recipe, tokens=tokens)
    # A run that goes on has as many as it had, and talks no more.
    assert Budget(50.0, tmp_path / "run").talked and Budget(50.0, tmp_path / "run").cut(recipe) == cut
    assert json.loads((tmp_path / "run" / "budget.json").read_text()) == {"tokens": tokens}


def test_a_run_that_fits_stays_whole(recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "tokens_per_second", lambda recipe: 1e9)
    assert Budget(1.0, tmp_path).cut(recipe) == recipe


def test_at_least_one_step(recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "tokens_per_second", lambda recipe: 0.001)
    assert Budget(1.0, tmp_path).cut(recipe).tokens == recipe.batch_tokens


def test_its_speed_is_that_of_its_steps(recipe) -> None:
    assert tokens_per_second(recipe) > 0


@pytest.mark.parametrize("minutes", [-1.0, float("nan"), float("inf")])
def test_what_is_no_budget(tmp_path: Path, minutes: float) -> None:
    with pytest.raises(UserError, match="budget"):
        Budget(minutes, tmp_path)
