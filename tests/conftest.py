"""Fixtures that several folders of tests share: tiny checkpoints with random weights, as transformers saves them."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.files import cache_folder

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Where the user's models are, for the test of a real one; workers inherit it.
os.environ.setdefault("HASTEN_TEST_CACHE", str(cache_folder("")))
# Curves that tests measure must not stay where the user's own are kept.
os.environ["HASTEN_CACHE"] = tempfile.mkdtemp(prefix="hasten-cache-")

import pytest
import torch

if not torch.cuda.is_available():
    # GPU kernels are tested in Triton's interpreter. Triton reads this when transformers imports it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings
from transformers import PreTrainedModel

from hasten import LLM
from hasten.tasks import TASKS
from helpers import random_model, save_checkpoint, save_diffusion_checkpoint

# One thread: the models are tiny, and suites that run side by side must not wait for each other at barriers.
torch.set_num_threads(1)

# The same examples on every run; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("hasten", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "hasten"))


@dataclass(frozen=True)
class Checkpoint:
    """A folder, and the transformers model (float32, eager) that was saved there."""

    folder: Path
    reference: PreTrainedModel

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[tokens, vocabulary] by transformers."""
        with torch.inference_mode():
            logits: torch.Tensor = self.reference(torch.tensor([tokens])).logits[0].float()
        return logits


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """make_checkpoint(architecture, **settings): built once per session and combination; do not write there."""
    made: dict[str, Checkpoint] = {}

    def make(architecture: str, **settings: Any) -> Checkpoint:
        key = repr((architecture, sorted(settings.items())))
        if key not in made:
            model = random_model(architecture, **settings)
            folder = tmp_path_factory.mktemp(architecture)
            model.save_pretrained(folder)
            made[key] = Checkpoint(folder, model)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with tokenizer; `tiny-draft` lies beside it. Copy it before changing anything."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def diffusion_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """diffusion_checkpoint(attention, alignment): a folder, made once per session; do not write there."""

    @functools.cache
    def make(attention: str, alignment: str = "same") -> Path:
        return save_diffusion_checkpoint(tmp_path_factory.mktemp(attention), attention, alignment)

    return make


@pytest.fixture(scope="session")
def diffusion_llm(diffusion_checkpoint: Callable[..., Path]) -> Callable[..., LLM]:
    """diffusion_llm(attention, alignment): that model, shared."""

    @functools.cache
    def load(attention: str, alignment: str = "same") -> LLM:
        return LLM(diffusion_checkpoint(attention, alignment), dtype="float32")

    return load


@pytest.fixture(scope="session")
def llm(tiny: Path) -> LLM:
    """The model of that checkpoint, shared by all tests of engine, methods and conformance."""
    return LLM(tiny, dtype="float32")


@pytest.fixture
def only_tasks() -> Iterator[Callable[..., None]]:
    """only_tasks("copy", "reverse"): while the test runs there are no others. Few are enough, and faster.

    All come back in the order that they had, which is the order of what models are asked.
    """
    before = dict(TASKS)

    def keep(*names: str) -> None:
        for name in before.keys() - set(names):
            del TASKS[name]

    yield keep
    TASKS.clear()
    TASKS.update(before)
