"""TiDAR's recipe (arXiv 2511.08923): the same model predicts the next token causally, and the next block from masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from hasten.errors import UserError
from hasten.train.data import Batch
from hasten.train.diffusion.adapt import BlockAdaptation, Text
from hasten.train.diffusion.copies import Copies, next_token_loss
from hasten.train.diffusion.losses import mean_cross_entropy
from hasten.train.diffusion.masks import answer_blocks
from hasten.train.forward import logits


@dataclass(frozen=True)
class DraftAndVerify(BlockAdaptation):
    """`block` tokens are drafted at once; `alpha` weighs the autoregressive loss against that of the masks."""

    alpha: float = 1.0

    attention: ClassVar[str] = "context-causal"
    alignment: ClassVar[str] = "same"
    decoders: ClassVar[tuple[str, ...]] = ("plain", "threshold")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise UserError("alpha must be 0 or more")

    def loss(self, model: LlamaForCausalLM, batch: Batch, progress: float, generator: torch.Generator) -> Tensor:
        """(alpha * next-token loss + loss of the masks) / (1 + alpha); the noised copy is hidden as a whole.

        Drafts begin anywhere, so each text's blocks begin at a random offset.
        """
        text = self.canvas(model, batch, generator)
        offsets = torch.randint(self.block, text.start.shape, generator=generator)
        blocks = answer_blocks(text.start, text.ids.shape[1], self.block, offsets)
        copies = self.copies(model, text, text.answer, blocks)
        masks = mean_cross_entropy(logits(model, copies.noised[text.answer[:, copies.first :]]), text.ids[text.answer])
        return (self.alpha * next_token_loss(model, text, copies.clean) + masks) / (1 + self.alpha)

    def predict(self, model: LlamaForCausalLM, text: Text, hidden: Tensor, wanted: Tensor) -> Tensor:
        """A row predicts its own position."""
        copies = self.copies(model, text, hidden, self.blocks(text))
        return logits(model, copies.noised[wanted[:, copies.first :]])

    def copies(self, model: LlamaForCausalLM, text: Text, hidden: Tensor, blocks: Tensor) -> Copies:
        """Both copies under the context-causal mask."""
        return Copies.run(model, text, hidden, blocks, int(text.start.min()), "causal", self.dtype)
