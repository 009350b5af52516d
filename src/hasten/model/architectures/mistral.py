"""Mistral: Llama with a sliding window in every layer (where the configuration sets one)."""

from functools import partial

from hasten.model.architectures.base import (
    Architecture,
    layer_windows,
    llama_pieces,
    read_llama_family,
    register,
)

DEFAULTS = {
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "eos_token_id": 2,
}

register(
    Architecture(
        "mistral",
        DEFAULTS,
        lambda config: read_llama_family(config, layer_windows(config, config.sliding_window)),
        partial(llama_pieces, biases="none"),
    )
)
