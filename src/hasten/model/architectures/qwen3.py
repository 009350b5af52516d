"""Qwen3: Llama with RMS norms on each head's queries and keys."""

from functools import partial

from hasten.model.architectures import qwen2
from hasten.model.architectures.base import Architecture, llama_pieces, register

DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128}

register(Architecture("qwen3", DEFAULTS, qwen2.read, partial(llama_pieces, head_norms=True)))
