"""The default forward pass on a GPU: see `backend.py`, and `refusal` for who may use it.

The other files need Triton, which comes with PyTorch's CUDA builds; import them where `refusal` has nothing to say.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from hasten.model.config import Slots

if TYPE_CHECKING:
    from hasten.model.config import ModelConfig


def refusal(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the CUDA backend cannot run a model, in a few words; None if it can."""
    if device.type != "cuda":
        return "it runs on CUDA devices only"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "it knows float32, bfloat16 and float16 only"
    if not all(isinstance(layer.keeps, Slots) and layer.window is None for layer in config.layers):
        return "it knows neither sliding windows nor recurrent layers"
    if len({(layer.heads, layer.keeps) for layer in config.layers}) > 1:
        return "all attention layers must have one shape"
    if find_spec("triton") is None:
        return "Triton is not installed"
    return None
