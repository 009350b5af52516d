"""Skipping: the target with some of its work left out, to draft with what is left or to decode by it; one file each."""

from hasten.methods.skipping import ffn_skipllm, skipdecode, swift

__all__ = ["ffn_skipllm", "skipdecode", "swift"]
