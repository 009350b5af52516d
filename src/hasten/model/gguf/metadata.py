"""What a GGUF file's metadata says of the model, as the configuration of a Hugging Face checkpoint would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hasten.errors import UserError
from hasten.model.architectures import ARCHITECTURES
from hasten.model.config import ModelConfig
from hasten.model.gguf.file import GGUF

SUPPORTED = ("llama", "qwen2", "qwen3")
"""Architectures by their names in GGUF; Mistral's models are called llama there."""

SCALINGS = ("none", "linear", "yarn")
FACTORS = "rope_freqs.weight"
"""What frequencies of the rope are divided by, where Llama 3 scales them."""

ENDS = ("eos", "eot", "eom")
"""Ends of the text, of a turn and of a message."""


def read_config(file: GGUF) -> ModelConfig:
    """The model configuration of a GGUF file.

    Raises:
        UserError: an unknown architecture (the message lists the known ones), or metadata that is missing, of the wrong
            type, or does not fit the tensors.
    """
    kind = file.text("general.architecture")
    if kind not in SUPPORTED:
        known = ", ".join(SUPPORTED)
        raise UserError(f"architecture {kind!r} in {file.path} is not supported; supported in GGUF are {known}")
    raw = _fields(file, kind)
    try:
        config = ARCHITECTURES[raw["model_type"]].config(raw)
    except UserError as error:
        raise UserError(str(error).replace("config.json", str(file.path))) from error
    return _scaled(file, config)


def _fields(file: GGUF, kind: str) -> dict[str, Any]:
    """The fields of a config.json.

    Raises:
        UserError: as `read_config` says.
    """
    layers, hidden = file.whole(f"{kind}.block_count"), file.whole(f"{kind}.embedding_length")
    heads = _same(file, f"{kind}.attention.head_count")
    kv_heads = _same(file, f"{kind}.attention.head_count_kv", heads)
    head_dim = file.whole(f"{kind}.attention.key_length", hidden // heads if heads else 0)
    ffn = _same(file, f"{kind}.feed_forward_length")
    _require_tensors(file, layers, {"embedding_length": hidden, "feed_forward_length": ffn, "heads": heads * head_dim})
    for key in ("attention.value_length", "rope.dimension_count"):
        if file.whole(f"{kind}.{key}", head_dim) != head_dim:
            width = file.whole(f"{kind}.{key}")
            raise UserError(f"{file.path} has {kind}.{key} {width} beside heads of {head_dim}, which is not supported")
    ends = [file.whole(key) for end in ENDS if (key := f"tokenizer.ggml.{end}_token_id") in file.metadata]
    return {
        "model_type": kind,
        "vocab_size": file.whole(f"{kind}.vocab_size", _rows(file, "token_embd.weight")),
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": file.whole(f"{kind}.context_length"),
        "rms_norm_eps": file.real(f"{kind}.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope(file, kind),
        "eos_token_id": list(dict.fromkeys(ends)),
    } | _window(file, kind)


def _same(file: GGUF, key: str, default: int | None = None) -> int:
    """A number that may be given per layer.

    Raises:
        UserError: it is missing or no whole number, or layers differ.
    """
    if not isinstance(file.metadata.get(key), np.ndarray):
        return file.whole(key, default)
    numbers = file.numbers(key)
    if len(set(numbers)) != 1:
        raise UserError(f"{file.path} has another {key} in each layer, which is not supported")
    return int(numbers[0])


def _require_tensors(file: GGUF, layers: int, sizes: Mapping[str, int]) -> None:
    """Refuse sizes that the tensors cannot have, before anything of that size is made.

    Raises:
        UserError: more layers than tensors, or a size beyond that of every tensor.
    """
    largest = max((max(stored.shape) for stored in file.tensors.values()), default=0)
    if layers > len(file.tensors):
        raise UserError(f"{file.path} describes {layers} layers, but has {len(file.tensors)} tensors")
    for name, size in sizes.items():
        if size > largest:
            raise UserError(f"{file.path} describes {name} of {size}, but its widest tensor has {largest}")


def _rows(file: GGUF, name: str) -> int:
    """Of a tensor that must be there.

    Raises:
        UserError: it is not.
    """
    if name not in file.tensors:
        raise UserError(f"the checkpoint in {file.path} has no tensor {name}")
    return file.tensors[name].shape[0]


def _rope(file: GGUF, kind: str) -> dict[str, Any]:
    """The rope as transformers 5 describes it."""
    # Older files scale lines by a key of their own.
    older = file.real(f"{kind}.rope.scale_linear", 1.0)
    scaling = file.text(f"{kind}.rope.scaling.type", "none" if older == 1 else "linear")
    if scaling not in SCALINGS:
        raise UserError(f"{file.path}: rope type {scaling!r} is not supported; supported are {', '.join(SCALINGS)}")
    rope: dict[str, Any] = {
        "rope_type": "default" if scaling == "none" else scaling,
        "rope_theta": file.real(f"{kind}.rope.freq_base", 10_000.0),
    }
    if scaling != "none":
        rope["factor"] = file.real(f"{kind}.rope.scaling.factor", older)
    original = f"{kind}.rope.scaling.original_context_length"
    if original in file.metadata:
        rope["original_max_position_embeddings"] = file.whole(original)
    if scaling == "yarn":
        for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if (key := f"{kind}.rope.scaling.{theirs}") in file.metadata:
                rope[ours] = file.real(key)
    return rope


def _window(file: GGUF, kind: str) -> dict[str, Any]:
    """The sliding window, where there is one: then a llama is a Mistral.

    Raises:
        UserError: another architecture has one.
    """
    window = file.whole(f"{kind}.attention.sliding_window", 0)
    if not window:
        return {}
    if kind != "llama":
        raise UserError(f"{file.path} has {kind}.attention.sliding_window, which is not supported for {kind}")
    return {"model_type": "mistral", "sliding_window": window}


def _scaled(file: GGUF, config: ModelConfig) -> ModelConfig:
    """The configuration with the frequencies that Llama 3's factors leave.

    Raises:
        UserError: more or fewer factors than frequencies, or one that is not above 0.
    """
    if FACTORS not in file.tensors:
        return config
    stored, frequencies = file.tensors[FACTORS], torch.tensor(config.inverse_frequencies)
    if stored.type != "F32" or stored.shape != frequencies.shape:
        found = f"{stored.type} {list(stored.shape)}"
        raise UserError(f"{FACTORS} in {file.path} is {found}, which must be F32 [{len(frequencies)}]")
    factors = torch.from_numpy(file.rows(FACTORS).view("<f4")[0])
    scaled = frequencies / factors
    if not scaled.isfinite().all() or (factors <= 0).any():
        raise UserError(f"{FACTORS} in {file.path} holds factors that are not finite numbers above 0")
    return replace(config, inverse_frequencies=tuple(scaled.tolist()))
