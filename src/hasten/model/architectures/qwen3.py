"""Qwen3: Llama with RMS norms on each head's queries and keys."""

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
        "qwen3",
        lambda config: read_llama_family(config, layer_windows(config)),
        partial(build_llama_family, head_norms=True),
    )
)
