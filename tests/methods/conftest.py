"""The tiny checkpoint and a model loaded from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten import LLM
from helpers import save_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder; `tiny-draft` lies beside it. Copy it before changing anything."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def llm(tiny: Path) -> LLM:
    return LLM(tiny, dtype="float32")
