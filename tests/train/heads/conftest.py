"""What heads are trained on here: what `tiny` says, once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten import LLM
from hasten.methods.heads.head import FINAL
from hasten.train.heads.dialogues import Writing, write_dialogues
from hasten.train.heads.recipe import DIALOGUES
from hasten.train.heads.speakers import SpeakerRecipe
from hasten.train.heads.states import read_states


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dialogues of `tiny`, and its states."""
    llm, made = LLM("tiny", dtype="float32"), tmp_path_factory.mktemp("data")
    dialogues = write_dialogues(llm, made / DIALOGUES, Writing(count=160, answer=40))
    read_states(llm, dialogues, (FINAL,), made / SpeakerRecipe.states, 10**9)
    return made
