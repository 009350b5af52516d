"""Fast-dLLM v2 (arXiv 2509.26328): Qwen2.5, adapted to fill blocks.

`model_type`, mask token and block are those of the released checkpoints and their configuration class
(Efficient-Large-Model/Fast_dLLM_v2_7B; repository NVlabs/Fast-dLLM, folder v2).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from hasten.model.architectures import qwen2
from hasten.model.architectures.base import Architecture, Fields, llama_pieces, register

DEFAULTS = {**qwen2.DEFAULTS, "mask_token_id": 151_665, "bd_size": 32}


def diffusion(config: Fields) -> Mapping[str, Any]:
    """Blocks see themselves and earlier ones; a row predicts the next position, as in the parent."""
    return {
        "attention": "block-causal",
        "alignment": "shifted",
        "mask_token_id": config.mask_token_id,
        "block_length": config.bd_size,
    }


register(Architecture("Fast_dLLM_Qwen", DEFAULTS, qwen2.read, partial(llama_pieces, biases="qkv"), diffusion=diffusion))
