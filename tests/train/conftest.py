"""A parent of 20,000 weights with the shipped tokenizer, and a batch of tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hasten.model.checkpoint import resolve
from hasten.train.data import Batch, Document, pad
from hasten.train.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("parent")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(resolve("tiny")).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def batch() -> Batch:
    """Two answers that ended, one text that was cut off, one that is all answer; end token 0."""
    return pad(
        [
            Document([5, 6, 7, 8, 9, 10, 11, 0], 3),
            Document([12, 13, 14, 15, 16, 0], 4),
            Document([17, 18, 19, 20, 21, 22, 23, 24, 25], 2),
            Document([26, 27, 28, 29, 0], 0),
        ],
        0,
    )
