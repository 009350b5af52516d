"""Mistral: Llama with a sliding window in every layer (where the configuration sets one)."""

from functools import partial

from hasten.model.architectures.base import (
    Architecture,
    build_llama_family,
    layer_windows,
    read_llama_family,
    register,
)

register(
    Architecture(
        "mistral",
        lambda config: read_llama_family(config, layer_windows(config)),
        partial(build_llama_family, biases="none"),
    )
)
