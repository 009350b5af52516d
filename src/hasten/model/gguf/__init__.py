"""GGUF checkpoints: one file with configuration, tokenizer and weights, as llama.cpp reads them."""

from hasten.model.gguf.file import GGUF, open_gguf
from hasten.model.gguf.metadata import read_config
from hasten.model.gguf.tensors import GGUFTensors
from hasten.model.gguf.tokenizer import read_tokenizer

__all__ = ["GGUF", "GGUFTensors", "open_gguf", "read_config", "read_tokenizer"]
