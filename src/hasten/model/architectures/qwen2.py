"""Qwen2 and 2.5: Llama with biases on q, k and v, and windows in the upper layers where switched on."""

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
        "qwen2",
        lambda config: read_llama_family(config, layer_windows(config)),
        partial(build_llama_family, biases="qkv"),
    )
)
