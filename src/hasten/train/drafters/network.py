"""A small model that is trained beside the target's head, in the target's words or in a few of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hasten.train import forward
from hasten.train.forward import additive, layer_outputs, normalised
from hasten.train.heads.recipe import HeadBatch


class DrafterNetwork(nn.Module):
    """The small model, and what of the target it is held against.

    Args:
        model: that is trained; where `words` are given, its tokens are their numbers, and one more for all others.
        words: int64 [words], ascending, of the target's tokens; None for all of them.
        head: [vocabulary, hidden], the target's.
        exits: numbers of layers behind which the model is to draft, ascending.
        dtype: of products and activations.
    """

    def __init__(
        self, model: LlamaForCausalLM, words: Tensor | None, head: Tensor, exits: Sequence[int], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.model, self.words, self.exits, self.dtype = model, words, tuple(exits), dtype
        every = torch.arange(len(head))
        kept = every if words is None else words
        self.number_of = torch.full_like(every, -1)
        self.number_of[kept] = torch.arange(len(kept))
        self.head = head[kept]

    def rows(self, batch: HeadBatch) -> tuple[Tensor, Tensor]:
        """int64 [n], [n]: rows behind which the target spoke, and the number of what it said; -1 where it has none."""
        same = batch.dialogue[1:] == batch.dialogue[:-1]
        rows = torch.nonzero(same & batch.answers[1:]).flatten()
        return rows, self.number_of[batch.ids[rows + 1]]

    def teacher(self, batch: HeadBatch, rows: Tensor) -> Tensor:
        """The target's logits of the words, float32 [n, words]."""
        return batch.states[rows, 0] @ self.head.T

    def logits(self, batch: HeadBatch, rows: Tensor) -> Iterator[Tensor]:
        """The model's own, float32 [n, words], behind each exit."""
        ids, place = self.aligned(batch)
        causal = torch.ones(1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        outputs = layer_outputs(self.model, ids, additive(causal, self.dtype), None, self.dtype)
        for depth, x in enumerate(outputs, 1):
            if depth in self.exits:
                yield self.said(x[batch.dialogue[rows], place[rows]])

    def aligned(self, batch: HeadBatch) -> tuple[Tensor, Tensor]:
        """int64 [dialogues, length]: dialogues side by side, as the model reads them; and each row's place in its own.

        Padded on the right: with a causal mask no token sees the padding.
        """
        lengths = batch.dialogue.bincount()
        starts = lengths.cumsum(0) - lengths
        place = torch.arange(len(batch.ids)) - starts[batch.dialogue]
        numbers = self.number_of[batch.ids]
        numbers = torch.where(numbers < 0, len(self.head), numbers)
        ids = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64)
        ids[batch.dialogue, place] = numbers
        return ids, place

    def said(self, x: Tensor) -> Tensor:
        """Logits, float32 [n, words], of some outputs of a layer [n, width]."""
        return forward.logits(self.model, normalised(self.model, x))[:, : len(self.head)]


def from_nothing(config: LlamaConfig, table: Tensor, seed: int) -> LlamaForCausalLM:
    """A model of random weights, whose table of tokens (and head) is a projection of the target's.

    Args:
        table: [words, hidden] of the target; a row behind them in the new table stands for all other tokens.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    width, embedding = config.hidden_size, model.model.embed_tokens.weight
    if width <= table.shape[1]:
        with torch.no_grad():
            embedding[: len(table)] = projected(table, width) * config.initializer_range
    return model


def projected(table: Tensor, width: int) -> Tensor:
    """Rows as they lie along the directions in which they differ most [rows, width], of deviation 1."""
    centred = table - table.mean(0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -width:]
    along = centred @ directions
    scaled: Tensor = along / along.std()
    return scaled


def small_config(
    vocabulary: int, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, context: int
) -> LlamaConfig:
    """Of a Llama with one table for tokens and head."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        initializer_range=0.5 / math.sqrt(hidden),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
