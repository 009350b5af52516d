"""Qwen2 and 2.5: Llama with biases on q, k and v, and windows in the upper layers where switched on."""

from functools import partial

from hasten.model.architectures.base import (
    Architecture,
    Fields,
    layer_windows,
    llama_pieces,
    read_llama_family,
    register,
)
from hasten.model.config import ModelConfig

DEFAULTS = {
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def read(config: Fields) -> ModelConfig:
    """The configuration of Qwen2 and Qwen3."""
    window = config.sliding_window if config.use_sliding_window else None
    return read_llama_family(config, layer_windows(config, window, config.max_window_layers))


register(Architecture("qwen2", DEFAULTS, read, partial(llama_pieces, biases="qkv")))
