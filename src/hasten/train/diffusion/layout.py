"""Checkpoint layouts that training starts from and ends in: Llama's, and LLaDA's for masked diffusion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from hasten.errors import UserError
from hasten.model.architectures import llada
from hasten.model.architectures.base import TENSORS
from hasten.model.checkpoint import Tensors, read_json
from hasten.model.loading import read_config

FIELDS = {**llada.FIELDS, **{name: name for name in ("rms_norm_eps", "eos_token_id", "pad_token_id")}}
"""Llama's names of what a configuration says, and LLaDA's."""


def load(folder: Path) -> LlamaForCausalLM:
    """A checkpoint of either layout in float32; `config.diffusion` says how one that fills masks does so.

    Raises:
        UserError: it is of another architecture, or no folder.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a GGUF file: only the models of folders can be adapted")
    kind = read_json(folder / "config.json").get("model_type")
    if kind == "llama":
        model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model
    if kind != "llada":
        raise UserError(f"{folder} is not of the Llama architecture: only such models can be adapted")
    config = read_config(folder)
    diffusion = config.diffusion
    assert diffusion is not None
    fields: dict[str, Any] = {name: config.source.get(name) for name in FIELDS}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": config.source["rope_parameters"]["rope_theta"]}
    fields["diffusion"] = {
        "attention": diffusion.attention, "alignment": diffusion.alignment, "mask_token_id": diffusion.mask_id,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**fields))
    stored = Tensors(folder, torch.float32, torch.device("cpu"))
    state = model.state_dict()
    state |= {name: stored.get(theirs, *state[name].shape) for name, theirs in stored_names(model).items()}
    model.load_state_dict(state)
    return model


def stored_names(model: LlamaForCausalLM) -> dict[str, str]:
    """Of each tensor that a LLaDA stores, Llama's name and LLaDA's; a tied head is not stored."""
    pieces = llada.TENSORS.keys() - ({"head"} if model.config.tie_word_embeddings else set())
    return {
        f"{TENSORS[piece]}.weight".format(layer): f"{llada.TENSORS[piece]}.weight".format(layer)
        for piece in pieces
        for layer in range(model.config.num_hidden_layers)
    }


def save_llada(model: LlamaForCausalLM, folder: Path) -> None:
    """Write configuration, generation config and weights (bf16) of a Llama that was trained without a causal mask."""
    config = model.config
    assert config.rope_parameters is not None
    document = {
        **llada.LIKE_LLAMA,
        **{theirs: getattr(config, name) for name, theirs in FIELDS.items()},
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_parameters["rope_theta"],
        "mask_token_id": config.diffusion["mask_token_id"],
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    model.generation_config.save_pretrained(folder)
    state = model.state_dict()
    tensors = {theirs: state[name].bfloat16().contiguous() for name, theirs in stored_names(model).items()}
    save_torch_state_dict(tensors, folder, max_shard_size="15MB")
