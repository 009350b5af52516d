"""Llama 1 to 3.x: the plain pre-norm decoder (rope default, linear, llama3 or yarn)."""

from hasten.model.architectures.base import Architecture, llama_pieces, read_llama_family, register

DEFAULTS = {"max_position_embeddings": 2048, "eos_token_id": 2}

register(Architecture("llama", DEFAULTS, read_llama_family, llama_pieces))
