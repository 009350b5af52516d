"""TiDAR's recipe (arXiv 2511.08923): the same model predicts the next token causally, and the next block from masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from hasten.errors import UserError
from hasten.train.data import Batch
from hasten.train.diffusion.adapt import Adaptation, Text, end_id
from hasten.train.diffusion.copies import Copies, next_token_loss
from hasten.train.diffusion.losses import mean_cross_entropy
from hasten.train.diffusion.masks import answer_blocks
from hasten.train.forward import logits


@dataclass(frozen=True)
class DraftAndVerify(Adaptation):
    """`block` tokens are drafted at once; `alpha` weighs the autoregressive loss against that of the masks."""

    lr: float = 1e-3
    block: int = 8
    alpha: float = 1.0

    attention: ClassVar[str] = "context-causal"
    alignment: ClassVar[str] = "same"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 2 or self.alpha < 0:
            raise UserError("block must be at least 2, alpha 0 or more")

    def section(self, mask_id: int) -> dict[str, Any]:
        return {**super().section(mask_id), "block_length": self.block}

    def loss(self, model: LlamaForCausalLM, batch: Batch, progress: float, generator: torch.Generator) -> Tensor:
        """(alpha * next-token loss + loss of the masks) / (1 + alpha); the noised copy is hidden as a whole.

        Drafts begin anywhere, so each text's blocks begin at a random offset.
        """
        text = Text.of(batch, batch.ids.shape[1] + self.block, end_id(model))
        offsets = torch.randint(self.block, text.start.shape, generator=generator)
        copies = self.copies(model, text, text.answer, offsets)
        masks = mean_cross_entropy(logits(model, copies.noised[text.answer[:, copies.first :]]), text.ids[text.answer])
        return (self.alpha * next_token_loss(model, text, copies.clean) + masks) / (1 + self.alpha)

    def predict(self, model: LlamaForCausalLM, text: Text, hidden: Tensor, wanted: Tensor) -> Tensor:
        """Blocks begin with the answer; a row predicts its own position."""
        copies = self.copies(model, text, hidden, torch.zeros_like(text.start))
        return logits(model, copies.noised[wanted[:, copies.first :]])

    def copies(self, model: LlamaForCausalLM, text: Text, hidden: Tensor, offsets: Tensor) -> Copies:
        """Both copies under the context-causal mask."""
        blocks = answer_blocks(text.start, text.ids.shape[1], self.block, offsets)
        return Copies.run(model, text, hidden, blocks, int(text.start.min()), "causal", self.dtype)
