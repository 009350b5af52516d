"""Checkpoints with random weights that fill masked positions, of every kind, beside transformers' own."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from canvases import BLOCK, CONFIGS
from torch import Tensor

from hasten.model import Decoder, DiffusionConfig, load_model
from helpers import save_checkpoint

MASK_ID = 90


@dataclass(frozen=True)
class Pair:
    """A model of hasten's in float64, its folder, and the same by transformers."""

    config: DiffusionConfig
    model: Decoder
    folder: Path
    reference: Any

    def logits(self, ids: Tensor, sees: Tensor) -> Tensor:
        """transformers' logits [rows, vocabulary], where row i sees the rows `sees[i]`."""
        additive = torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, torch.finfo(torch.float64).min)
        with torch.inference_mode():
            logits: Tensor = self.reference(ids[None], attention_mask=additive[None, None]).logits[0]
        return logits


def write_section(folder: Path, config: DiffusionConfig) -> None:
    """Say in config.json how the checkpoint fills masked positions."""
    fields = json.loads((folder / "config.json").read_text())
    section = {"attention": config.attention, "alignment": config.alignment, "mask_token_id": config.mask_id}
    fields["diffusion"] = section | ({} if config.block is None else {"block_length": config.block})
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.fixture(scope="session")
def models(make_checkpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """models(name of a configuration, block): made once."""
    made: dict[tuple[str, int], Pair] = {}

    def make(name: str, block: int = BLOCK) -> Pair:
        if (name, block) not in made:
            checkpoint = make_checkpoint("llama", num_hidden_layers=2)
            config = replace(CONFIGS[name], mask_id=MASK_ID)
            config = config if config.block is None else replace(config, block=block)
            folder = tmp_path_factory.mktemp("canvas") / name
            shutil.copytree(checkpoint.folder, folder)
            write_section(folder, config)
            model = load_model(folder, dtype="float64", device="cpu")
            made[name, block] = Pair(config, model, folder, copy.deepcopy(checkpoint.reference).double())
        return made[name, block]

    return make


@pytest.fixture(scope="session")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that sees everything, with a tokenizer."""
    folder = save_checkpoint(tmp_path_factory.mktemp("readable"))
    write_section(folder, replace(CONFIGS["full-same"], mask_id=149))
    return folder
