"""Checkpoint layouts that training starts from and ends in: Llama's, and LLaDA's for masked diffusion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hasten.errors import UserError
from hasten.model.checkpoint import Tensors, read_json
from hasten.model.loading import read_config

LLADA_NAMES = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
    "model.layers": "model.transformer.blocks",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
"""Llama's names of tensors, or of parts of them, and LLaDA's."""

LLADA_FIELDS = {
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_sequence_length",
    "vocab_size": "embedding_size",
    "hidden_act": "activation_type",
    "tie_word_embeddings": "weight_tying",
    "rms_norm_eps": "rms_norm_eps",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
"""The same for fields of the configuration."""

LLADA_FIXED: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "block_type": "llama",
    "include_bias": False,
    "include_qkv_bias": False,
    "layer_norm_type": "rms",
    "rope": True,
}
"""Fields that say that a LLaDA is built like a Llama."""


def load(folder: Path) -> LlamaForCausalLM:
    """A checkpoint of either layout in float32; `config.diffusion` says how one that fills masks does so.

    Raises:
        UserError: it is of another architecture.
    """
    raw = read_json(folder / "config.json")
    if raw.get("model_type") == "llama":
        model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model
    if raw.get("model_type") != "llada":
        raise UserError(f"{folder} is not of the Llama architecture: only such models can be adapted")
    rope = {"rope_type": "default", "rope_theta": raw["rope_theta"]}
    diffusion = read_config(folder).diffusion
    assert diffusion is not None
    fields = {llama: raw[llada] for llama, llada in LLADA_FIELDS.items()}
    fields["diffusion"] = {
        "attention": diffusion.attention, "alignment": diffusion.alignment, "mask_token_id": diffusion.mask_id,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**fields, rope_parameters=rope))
    stored = Tensors(folder, torch.float32, torch.device("cpu"))
    state = model.state_dict()
    for name in state:
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            state[name] = stored.get(llada_name(name), *state[name].shape)
    model.load_state_dict(state)
    return model


def llada_name(name: str) -> str:
    """What LLaDA calls a Llama's tensor."""
    for llama, llada in LLADA_NAMES.items():
        name = name.replace(llama, llada)
    return name


def llada_tensors(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """The weights in bf16 under LLaDA's names; a tied head is left out."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        tensors[llada_name(name)] = tensor.to(torch.bfloat16).contiguous()
    return tensors


def save_llada(model: LlamaForCausalLM, folder: Path) -> None:
    """Write configuration, generation config and weights of a Llama that was trained without a causal mask."""
    config = model.config
    assert config.rope_parameters is not None
    document = {
        **LLADA_FIXED,
        **{llada: getattr(config, llama) for llama, llada in LLADA_FIELDS.items()},
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_parameters["rope_theta"],
        "mask_token_id": config.diffusion["mask_token_id"],
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    model.generation_config.save_pretrained(folder)
    save_torch_state_dict(llada_tensors(model), folder, max_shard_size="15MB")
