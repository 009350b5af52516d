"""Fast-dLLM v2's recipe (arXiv 2509.26328): block-causal attention, complementary views, next-token read-out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from hasten.errors import UserError
from hasten.train.data import Batch
from hasten.train.diffusion.adapt import Adaptation, Text, ceil_to, end_id
from hasten.train.diffusion.copies import Copies
from hasten.train.diffusion.corruption import complement, per_block
from hasten.train.diffusion.losses import mean_cross_entropy
from hasten.train.diffusion.masks import aligned_blocks
from hasten.train.forward import logits


@dataclass(frozen=True)
class ComplementaryBlocks(Adaptation):
    """Blocks of `block` tokens, aligned to the start of the text."""

    lr: float = 1e-3
    block: int = 8

    attention: ClassVar[str] = "block-causal"
    alignment: ClassVar[str] = "shifted"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 2:
            raise UserError("block must be at least 2")

    def section(self, mask_id: int) -> dict[str, Any]:
        return {**super().section(mask_id), "block_length": self.block}

    def loss(self, model: LlamaForCausalLM, batch: Batch, progress: float, generator: torch.Generator) -> Tensor:
        """Mean cross-entropy over the hidden positions of two views that hide each position of the answer once."""
        text = Text.of(batch, ceil_to(batch.ids.shape[1], self.block), end_id(model))
        text.answer[:, 0] = False
        one = per_block(text.answer, aligned_blocks(text.answer, self.block), generator)
        hidden = torch.cat([one, complement(text.answer, one)])
        twice = replace(text, ids=text.ids.repeat(2, 1), answer=text.answer.repeat(2, 1), start=text.start.repeat(2))
        return mean_cross_entropy(self.predict(model, twice, hidden, hidden), twice.ids[hidden])

    def predict(self, model: LlamaForCausalLM, text: Text, hidden: Tensor, wanted: Tensor) -> Tensor:
        """A position is read off the noised row before it, which for a block's first token is of the block before."""
        blocks = aligned_blocks(text.answer, self.block)
        first = max(0, (int(text.start.min()) // self.block - 1) * self.block)
        copies = Copies.run(model, text, hidden, blocks, first, "block-causal", self.dtype)
        return logits(model, copies.noised[:, :-1][wanted[:, first + 1 :]])
