"""Pre-train a small Llama-architecture language model: `hasten train lm`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hasten.errors import UserError
from hasten.model.checkpoint import resolve
from hasten.train.data import IGNORE, Batch
from hasten.train.forward import additive, hidden_states, logits
from hasten.train.recipe import Recipe
from hasten.train.tokenizer import load_tokenizer, train_tokenizer


@dataclass(frozen=True)
class Pretraining(Recipe):
    """The model's shape, and the model folder or name its tokenizer is taken from; None trains one."""

    hidden: int = 256
    layers: int = 5
    heads: int = 8
    kv_heads: int = 4
    ffn: int = 640
    vocabulary: int = 2048
    tokenizer_of: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.hidden, self.heads, self.kv_heads) < 1:
            raise UserError("hidden, heads and kv-heads must be positive")
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise UserError("hidden must be a multiple of heads, and heads a multiple of kv-heads")
        if self.hidden // self.heads % 2:
            raise UserError("hidden must be an even multiple of heads: positions turn pairs of numbers")
        if min(self.layers, self.ffn) < 1 or self.vocabulary < 300:
            raise UserError("layers and ffn must be positive, vocabulary at least 300")

    def tokenizer(self) -> PreTrainedTokenizerFast:
        if self.tokenizer_of is None:
            return train_tokenizer(self.vocabulary, self.context, seed=self.seed)
        return load_tokenizer(resolve(self.tokenizer_of))

    def build(self, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
        """A freshly initialised model, with tied embeddings."""
        torch.manual_seed(self.seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=self.hidden,
                intermediate_size=self.ffn,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.kv_heads,
                max_position_embeddings=self.context,
                tie_word_embeddings=True,
                rms_norm_eps=1e-5,
                initializer_range=0.5 / math.sqrt(self.hidden),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )

    def loss(self, model: LlamaForCausalLM, batch: Batch, progress: float, generator: torch.Generator) -> Tensor:
        """Mean cross-entropy over labelled tokens; the head runs on their rows only."""
        length = batch.ids.shape[1]
        mask = additive(torch.ones(1, length, length, dtype=torch.bool).tril(), self.dtype)
        return next_token_loss(model, hidden_states(model, batch.ids, mask, None, self.dtype), batch.labels)


def next_token_loss(model: LlamaForCausalLM, states: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over labelled tokens; the head runs on the rows before them only.

    Args:
        states: normalised [rows, length, width].
        labels: [rows, length], as of `Batch`.
    """
    labels = labels[:, 1:]
    wanted = labels != IGNORE
    return F.cross_entropy(logits(model, states[:, :-1][wanted]), labels[wanted])
