"""Writes GGUF files of tiny models, as llama.cpp's converter lays them out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hasten.model.architectures.base import TENSORS
from hasten.model.gguf.tensors import NAMES

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
GGUF_NAMES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Of transformers' model types."""


def called(name: str) -> str:
    """GGUF's name of a tensor that transformers calls so."""
    pattern = [*name.split(".")]
    layer = pattern[2] if pattern[:2] == ["model", "layers"] else ""
    stem, _, part = name.rpartition(".")
    piece = next(piece for piece, theirs in TENSORS.items() if theirs.format(layer) == stem)
    return f"{NAMES[piece].format(layer)}.{part}"


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """The rows of queries or keys with the halves of each head interleaved, as llama's files have them."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def rounded(model: PreTrainedModel, kind: GGMLQuantizationType) -> PreTrainedModel:
    """The model with its matrices as they are once they were quantised, in place."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind).copy()))
    return model


def write_model(
    path: Path,
    model: PreTrainedModel,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a model.

    Args:
        kind: of its matrices.
        metadata: in place of what the model says, or beside it; None leaves a key out.
        tokenizer: its keys and values.
        tensors: beside the model's.
    """
    config: Any = model.config
    name = GGUF_NAMES[config.model_type]
    writer = GGUFWriter(path, name)
    fields: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "vocab_size": config.vocab_size,
    }
    if config.model_type == "qwen3":
        fields |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    given = {f"{name}.{key}": value for key, value in fields.items()} | dict(metadata or {}) | dict(tokenizer or {})
    for key, value in given.items():
        if value is not None:
            add(writer, key, value)
    for theirs, weight in model.state_dict().items():
        if theirs == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.float().numpy()
        if name == "llama" and ("q_proj" in theirs or "k_proj" in theirs):
            values = interleaved(
                values, config.num_attention_heads if "q_proj" in theirs else config.num_key_value_heads
            )
        add_tensor(writer, called(theirs), values, kind)
    for ours, values in (tensors or {}).items():
        writer.add_tensor(ours, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    """A key, in the type that Python's value has."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def add_tensor(writer: GGUFWriter, name: str, values: np.ndarray, kind: GGMLQuantizationType) -> None:
    """A matrix in a type; what is no matrix stays float32."""
    if values.ndim < 2 or kind == GGMLQuantizationType.F32:
        writer.add_tensor(name, np.ascontiguousarray(values))
    else:
        writer.add_tensor(name, quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)


def byte_level(tokenizer: PreTrainedTokenizerBase, pre: str, **more: Any) -> dict[str, Any]:
    """The keys of a byte-level BPE tokenizer, from transformers' own."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {each["content"]: CONTROL if each["special"] else USER_DEFINED for each in described["added_tokens"]}
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    return (
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [added.get(token, NORMAL) for token in tokens],
            "tokenizer.ggml.merges": merges,
            "tokenizer.chat_template": tokenizer.chat_template,
        }
        | {f"tokenizer.ggml.{name}_token_id": id for name, id in ids.items() if id is not None}
        | {f"tokenizer.{key}": value for key, value in more.items()}
    )
