"""A Hugging Face Llama folder as a GGUF file, by the `gguf` package. Ids go in and come out, so it has no vocabulary.

llama.cpp's own converter is not part of any package. What it does for a Llama is little: other names, and rows of the
query and key projections in the order of its rope, which turns neighbours where Hugging Face turns halves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes  # noqa: F401 - with it, numpy and so safetensors know bfloat16
import numpy as np
from safetensors import safe_open

FILE = "model.gguf"
TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "int8": gguf.GGMLQuantizationType.Q8_0,
    "int4": gguf.GGMLQuantizationType.Q4_0,
}


def convert(source: Path, target: Path, precision: str) -> None:
    """Write `target/model.gguf`: matrices in the type of the precision, norms in float32."""
    config = json.loads((source / "config.json").read_text())
    if config["model_type"] != "llama":
        raise ValueError(f"only Llama checkpoints can be converted, not {config['model_type']}")
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    key_heads = config.get("num_key_value_heads") or heads
    writer = gguf.GGUFWriter(target / FILE, "llama")
    _describe(writer, config, heads, key_heads)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping, though it has keys
                data = np.asarray(tensors.get_tensor(name)).astype(np.float32)
                if name.endswith(("q_proj.weight", "k_proj.weight")):
                    data = _interleave(data, heads if "q_proj" in name else key_heads)
                kind = TYPES[precision] if data.ndim > 1 else gguf.GGMLQuantizationType.F32
                own = names.get_name(name, try_suffixes=(".weight", ".bias"))
                writer.add_tensor(own, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: gguf.GGUFWriter, config: dict[str, Any], heads: int, key_heads: int) -> None:
    """The shape of the model."""
    size = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise ValueError("scaled rope is not converted")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Per head, rows `0, half, 1, half + 1, ...` of `[heads * size, hidden]`."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
