"""Fast-dLLM v2's recipe (arXiv 2509.26328): block-causal attention, complementary views, next-token read-out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from hasten.train.data import IGNORE, Batch
from hasten.train.diffusion.adapt import BlockAdaptation, Text, ceil_to, end_id
from hasten.train.diffusion.copies import Copies
from hasten.train.diffusion.corruption import complement, per_block
from hasten.train.diffusion.losses import mean_cross_entropy
from hasten.train.diffusion.masks import aligned_blocks
from hasten.train.forward import logits


@dataclass(frozen=True)
class ComplementaryBlocks(BlockAdaptation):
    """Blocks of `block` tokens, aligned to the start of the text."""

    attention: ClassVar[str] = "block-causal"
    alignment: ClassVar[str] = "shifted"
    decoders: ClassVar[tuple[str, ...]] = ("fast-dllm-v2:part=0",)

    def loss(self, model: LlamaForCausalLM, batch: Batch, progress: float, generator: torch.Generator) -> Tensor:
        """Mean cross-entropy over the hidden positions of two views that hide each position of the answer once.

        What pads a text to whole blocks is hidden as a decoder meets it, and not learned.
        """
        text = self.canvas(model, batch, generator)
        text.answer[:, 0] = False
        one = per_block(text.answer, self.blocks(text), generator)
        hidden = torch.cat([one, complement(text.answer, one)])
        twice = replace(text, ids=text.ids.repeat(2, 1), answer=text.answer.repeat(2, 1), start=text.start.repeat(2))
        wanted = hidden & (text.labels != IGNORE).repeat(2, 1)
        return mean_cross_entropy(self.predict(model, twice, hidden, wanted), twice.ids[wanted])

    def predict(self, model: LlamaForCausalLM, text: Text, hidden: Tensor, wanted: Tensor) -> Tensor:
        """A position is read off the noised row before it, which for a block's first token is of the block before."""
        blocks = self.blocks(text)
        first = max(0, (int(text.start.min()) // self.block - 1) * self.block)
        copies = Copies.run(model, text, hidden, blocks, first, "block-causal", self.dtype)
        return logits(model, copies.noised[:, :-1][wanted[:, first + 1 :]])

    def blocks(self, text: Text) -> Tensor:
        """Counted from the start of the text, prompt or not."""
        return aligned_blocks(text.answer, self.block)

    def canvas(self, model: LlamaForCausalLM, batch: Batch, generator: torch.Generator) -> Text:
        """Whole blocks."""
        return Text.of(batch, ceil_to(batch.ids.shape[1], self.block), end_id(model))
