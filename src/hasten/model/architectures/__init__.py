"""One file per architecture: how its configuration reads and how its tensors become pieces."""

from hasten.model.architectures import llama, mistral, qwen2, qwen3
from hasten.model.architectures.base import ARCHITECTURES, Architecture

__all__ = ["ARCHITECTURES", "Architecture", "llama", "mistral", "qwen2", "qwen3"]
