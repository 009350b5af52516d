"""LLaDA (arXiv 2502.09992): a Llama without a causal mask, under the names of OLMo.

Facts about the released models are those of the repository ML-GSAI/LLaDA and its checkpoints' configurations.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from hasten.errors import UserError
from hasten.model.architectures.base import Architecture, Fields, llama_pieces, read_llama_family, register
from hasten.model.config import ModelConfig

DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": None}

FIELDS = {
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_sequence_length",
    "hidden_act": "activation_type",
    "tie_word_embeddings": "weight_tying",
    # The rows of the embedding, where padding makes them more than the tokenizer's tokens.
    "vocab_size": "embedding_size",
}

LIKE_LLAMA: Mapping[str, Any] = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    **dict.fromkeys(
        (
            "alibi",
            "attention_layer_norm",
            "bias_for_layer_norm",
            "include_bias",
            "include_qkv_bias",
            "input_emb_norm",
            "multi_query_attention",
            "scale_logits",
        ),
        False,
    ),
}
"""What the configuration can switch, and the only values that make the model a Llama."""

TENSORS = {
    "embedding": "model.transformer.wte",
    "mixer_norm": "model.transformer.blocks.{}.attn_norm",
    "query": "model.transformer.blocks.{}.q_proj",
    "key": "model.transformer.blocks.{}.k_proj",
    "value": "model.transformer.blocks.{}.v_proj",
    "attention_out": "model.transformer.blocks.{}.attn_out",
    "mlp_norm": "model.transformer.blocks.{}.ff_norm",
    "gate": "model.transformer.blocks.{}.ff_proj",
    "up": "model.transformer.blocks.{}.up_proj",
    "down": "model.transformer.blocks.{}.ff_out",
    "norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
}

VOCABULARY = 126_464
"""Of LLaDA-8B and 1.5, whose special tokens need no configuration; other models under this name have their own."""
MASK, END_OF_TURN = 126_336, 126_348


def read(config: Fields) -> ModelConfig:
    """The configuration of a LLaDA that is built like a Llama."""
    for name, plain in LIKE_LLAMA.items():
        value = getattr(config, name, plain)
        if (value or False) != plain:
            raise UserError(f"config.json has {name} {value!r}; for llada only {plain!r} is supported")
    model = read_llama_family(config, spelling=FIELDS)
    # The configuration names the end of the text only.
    return replace(model, end_ids=(END_OF_TURN,) if model.vocab_size == VOCABULARY else ())


def diffusion(config: Fields) -> Mapping[str, Any]:
    """Every position sees every other; a row predicts its own."""
    mask = getattr(config, "mask_token_id", None)
    if mask is None and config.vocab_size == VOCABULARY:
        mask = MASK
    return {"attention": "full", "alignment": "same", "mask_token_id": mask}


register(Architecture("llada", DEFAULTS, read, partial(llama_pieces, names=TENSORS), FIELDS, diffusion))
