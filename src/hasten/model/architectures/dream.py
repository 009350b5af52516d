"""Dream (arXiv 2508.15487): Qwen2 without a causal mask; a row still predicts the next position.

Facts about the released models are those of the repository DreamLM/Dream and its checkpoints' configurations.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from hasten.model.architectures import qwen2
from hasten.model.architectures.base import Architecture, Fields, llama_pieces, register
from hasten.model.config import ModelConfig

DEFAULTS = {**qwen2.DEFAULTS, "mask_token_id": 151_666}

VOCABULARY = 152_064
"""Of Dream-7B."""
END_OF_TURN = 151_645
"""In that vocabulary; the configuration names the end of the text only."""


def read(config: Fields) -> ModelConfig:
    """Qwen2's configuration."""
    model = qwen2.read(config)
    return replace(model, end_ids=(END_OF_TURN,) if model.vocab_size == VOCABULARY else ())


def diffusion(config: Fields) -> Mapping[str, Any]:
    """Every position sees every other; the shift is what the weights bring from their autoregressive start."""
    return {"attention": "full", "alignment": "shifted", "mask_token_id": config.mask_token_id}


register(Architecture("Dream", DEFAULTS, read, partial(llama_pieces, biases="qkv"), diffusion=diffusion))
