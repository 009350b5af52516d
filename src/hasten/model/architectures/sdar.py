"""SDAR (arXiv 2510.06303) and TraDo: Qwen3, adapted to fill blocks; a row predicts its own position.

The mask token is that of the released checkpoints (repository JetAstra/SDAR). They were trained with blocks of 4 to 64
under one `model_type`, so the block must be in the configuration.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from hasten.model.architectures import qwen2, qwen3
from hasten.model.architectures.base import Architecture, Fields, llama_pieces, register

DEFAULTS = {**qwen3.DEFAULTS, "mask_token_id": 151_669, "block_size": None}


def diffusion(config: Fields) -> Mapping[str, Any]:
    """Blocks see themselves and earlier ones."""
    return {
        "attention": "block-causal",
        "alignment": "same",
        "mask_token_id": config.mask_token_id,
        "block_length": config.block_size,
    }


register(Architecture("sdar", DEFAULTS, qwen2.read, partial(llama_pieces, head_norms=True), diffusion=diffusion))
