"""Llama 1 to 3.x: the plain pre-norm decoder (rope default, linear, llama3 or yarn)."""

from hasten.model.architectures.base import Architecture, build_llama_family, read_llama_family, register

register(Architecture("llama", read_llama_family, build_llama_family))
