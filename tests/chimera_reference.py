"""Chimera computed anew for every node: all rows of a text and a path, side by side, through transformers' layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hasten.methods.heads.chimera_weights import NAMES, ChimeraWeights


class ChimeraReference:
    """A target and trained weights."""

    def __init__(self, model: LlamaForCausalLM, weights: ChimeraWeights) -> None:
        self.model, self.weights = model.float(), weights
        config = type(model.config)(**{**model.config.to_dict(), "intermediate_size": weights.layer.gate.shape[0]})
        config._attn_implementation = "eager"
        self.layer = LlamaDecoderLayer(config, 0).eval()
        parts = {f"{name}.weight": getattr(weights.layer, part).weight.float() for part, name in NAMES.items()}
        self.layer.load_state_dict(parts)

    @torch.inference_mode()
    def logits(self, text: Sequence[int], path: Sequence[int]) -> list[Tensor]:
        """What each level says along a path behind a text, whose last token is the root: the first behind none."""
        states = self.model.model(torch.tensor([list(text[:-1])])).last_hidden_state[0]
        tokens, known, root = [*text, *path], len(text) - 1, len(text) - 1
        said: list[Tensor] = []
        estimates: list[Tensor] = []
        for level in range(len(path) + 1):
            # First all states, then all g; those of the path at the end of each.
            above = torch.stack([*states, *estimates])
            grams = torch.stack([self.gram(tokens[: position + 1]) for position in range(1, known + level + 1)])
            rows = torch.cat([above, grams])
            positions = torch.cat([torch.arange(len(above)), torch.arange(1, len(grams) + 1)])
            hidden = torch.ones(len(rows), len(rows)).triu(1).bool()
            for row in range(len(grams)):
                # A g sees the states before its position, and g up to its own.
                hidden[len(above) + row] = True
                hidden[len(above) + row, : row + 1] = False
                hidden[len(above) + row, len(above) : len(above) + row + 1] = False
            mask = torch.zeros(1, 1, len(rows), len(rows)).masked_fill(hidden, torch.finfo(torch.float32).min)
            angles = self.model.model.rotary_emb(rows, positions[None])
            made = self.layer(rows[None], attention_mask=mask, position_ids=positions[None], position_embeddings=angles)
            made = made[0] if isinstance(made, tuple) else made
            estimate = made.reshape(len(rows), -1)[-1]
            said.append(self._head(level, states[root - 1], estimate))
            estimates.append(estimate)
        return said

    def gram(self, tokens: Sequence[int]) -> Tensor:
        """g of the last of some tokens."""
        last = tokens[-3:] if len(tokens) > 2 else [tokens[0], tokens[1], tokens[1]]
        parts = self.model.model.embed_tokens(torch.tensor(last))
        if self.weights.narrow is not None:
            parts = parts @ self.weights.narrow.weight.float().T
        side, mix = parts.flatten(), self.weights.mix
        assert mix.bias is not None
        mixed = side + F.silu(mix.weight.float() @ side + mix.bias.float())
        return self.weights.out.weight.float() @ mixed

    def _head(self, level: int, state: Tensor, estimate: Tensor) -> Tensor:
        head = self.weights.heads[level].weight.float()
        if head.shape[1] == 2 * len(state):
            return head @ torch.cat([state, estimate])
        said = self.model.lm_head.weight if self.weights.said is None else self.weights.said.weight.float()
        return said @ (estimate + head @ state)
