"""Training with a noised and a clean copy of each text: one forward pass, two kinds of predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from hasten.train.data import IGNORE
from hasten.train.diffusion.adapt import Text, mask_id
from hasten.train.diffusion.corruption import hide
from hasten.train.diffusion.losses import mean_cross_entropy
from hasten.train.diffusion.masks import two_copies
from hasten.train.forward import additive, hidden_states, logits


@dataclass(frozen=True)
class Copies:
    """Hidden states of both copies.

    `noised` [rows, length - first, width] are those of the positions from `first` on, `clean` [rows, length, width].
    """

    noised: Tensor
    clean: Tensor
    first: int

    @classmethod
    def run(
        cls,
        model: LlamaForCausalLM,
        text: Text,
        hidden: Tensor,
        blocks: Tensor,
        first: int,
        context: Literal["causal", "block-causal"],
        dtype: torch.dtype,
    ) -> Copies:
        """One pass over both, with masks where `hidden` in the noised one; see `two_copies`."""
        length = text.ids.shape[1]
        positions = torch.arange(length)
        states = hidden_states(
            model,
            torch.cat([hide(text.ids, hidden, mask_id(model))[:, first:], text.ids], 1),
            additive(two_copies(blocks, first, context), dtype),
            torch.cat([positions[first:], positions])[None],
            dtype,
        )
        noised, clean = torch.split(states, [length - first, length], 1)
        return cls(noised, clean, first)


def next_token_loss(model: LlamaForCausalLM, text: Text, clean: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of the labelled tokens, each read off the clean row before it."""
    labels = text.labels[:, 1:]
    wanted = labels != IGNORE
    return mean_cross_entropy(logits(model, clean[:, :-1][wanted]), labels[wanted])
