"""Fixtures that several folders of tests share: tiny checkpoints with random weights, as transformers saves them."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
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
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hasten import LLM
from helpers import save_checkpoint, save_diffusion_checkpoint

# One thread: the models are tiny, and suites that run side by side must not wait for each other at barriers.
torch.set_num_threads(1)

# The same examples on every run; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("hasten", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "hasten"))

CLASSES: dict[str, tuple[type[Any], type[Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


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


def random_model(architecture: str, **settings: Any) -> PreTrainedModel:
    """A model whose weights (biases and norms, too) are large enough for every part of it to matter."""
    config, model = CLASSES[architecture]
    if architecture == "qwen3":
        settings.setdefault("head_dim", 16)  # its default is 128
    torch.manual_seed(0)
    made: PreTrainedModel = model(config(**{**TINY, **settings}, attn_implementation="eager")).eval()
    for name, weight in made.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1.0, 0.2)
        elif weight.dim() == 1:
            torch.nn.init.normal_(weight, 0.0, 0.5)
        else:
            torch.nn.init.normal_(weight, 0.0, 1.5 / weight.shape[1] ** 0.5)
    return made


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
