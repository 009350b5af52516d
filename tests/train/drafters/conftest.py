"""What small drafters are trained on here, and one to begin with."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_drafters import recipe

from hasten import LLM
from hasten.train.drafters.align import AlignRecipe
from hasten.train.heads.dialogues import Writing, write_dialogues
from hasten.train.heads.recipe import DIALOGUES
from hasten.train.heads.states import read_states
from hasten.train.trainer import train


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dialogues of `tiny`, and its states."""
    llm, made = LLM("tiny", dtype="float32"), tmp_path_factory.mktemp("data")
    dialogues = write_dialogues(llm, made / DIALOGUES, Writing(count=160, answer=40))
    read_states(llm, dialogues, (("final_norm", 0),), made / AlignRecipe.states, 10**9)
    return made


@pytest.fixture(scope="session")
def pretrained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By cross-entropy alone."""
    made = tmp_path_factory.mktemp("pretrained") / "draft"
    train(recipe(folder, distance="ce", opening=0.0, tokens=60_000, lr=1e-2), made)
    return made
