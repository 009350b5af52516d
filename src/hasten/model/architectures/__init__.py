"""One file per architecture: how its configuration reads and how its tensors become pieces."""

from hasten.model.architectures import dream, fast_dllm_v2, llada, llama, mistral, qwen2, qwen3, sdar
from hasten.model.architectures.base import ARCHITECTURES, Architecture

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "dream",
    "fast_dllm_v2",
    "llada",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "sdar",
]
