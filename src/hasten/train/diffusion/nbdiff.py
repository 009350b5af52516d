"""NBDiff's recipe (arXiv 2512.06776): the context stays causal, and the block grows from one token to the full size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from hasten.errors import UserError
from hasten.train.data import Batch
from hasten.train.diffusion.adapt import BlockAdaptation, Text, end_id
from hasten.train.diffusion.copies import Copies, next_token_loss
from hasten.train.diffusion.corruption import per_block
from hasten.train.diffusion.losses import mean_cross_entropy
from hasten.train.diffusion.masks import answer_blocks
from hasten.train.forward import logits


@dataclass(frozen=True)
class NextBlock(BlockAdaptation):
    """`ramp` is the share of the run in which the block doubles until it has `block` tokens; `retention` the weight of
    the autoregressive loss on the clean copy."""

    ramp: float = 0.2
    retention: float = 1.0

    attention: ClassVar[str] = "context-causal"
    alignment: ClassVar[str] = "shifted"
    decoders: ClassVar[tuple[str, ...]] = ("plain", "nbdiff")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ramp and self.block & (self.block - 1):
            raise UserError("block must be a power of two: it grows by doubling")

    def block_at(self, progress: float) -> int:
        """The size of blocks in the course of the run: 1, 2, 4, ... for equal times, then `block`."""
        return min(self.block, 2 ** int(math.log2(self.block) * progress / self.ramp)) if self.ramp else self.block

    def loss(self, model: LlamaForCausalLM, batch: Batch, progress: float, generator: torch.Generator) -> Tensor:
        """Cross-entropy of what is hidden in the noised copy, plus that of the next token in the clean one."""
        block = self.block_at(progress)
        text = Text.of(batch, batch.ids.shape[1] + block, end_id(model))
        offsets = torch.randint(block, text.start.shape, generator=generator)
        blocks = answer_blocks(text.start, text.ids.shape[1], block, offsets)
        hidden = per_block(text.answer, blocks, generator)
        hidden[:, 0] = False
        copies = self.copies(model, text, hidden, blocks)
        masked = logits(model, _read_out(copies, blocks, hidden))
        return mean_cross_entropy(masked, text.ids[hidden]) + self.retention * next_token_loss(
            model, text, copies.clean
        )

    def predict(self, model: LlamaForCausalLM, text: Text, hidden: Tensor, wanted: Tensor) -> Tensor:
        """A block's first token is read off the finished text."""
        blocks = self.blocks(text)
        return logits(model, _read_out(self.copies(model, text, hidden, blocks), blocks, wanted))

    def copies(self, model: LlamaForCausalLM, text: Text, hidden: Tensor, blocks: Tensor) -> Copies:
        """Both copies under the context-causal mask."""
        return Copies.run(model, text, hidden, blocks, int(text.start.min()), "causal", self.dtype)


def _read_out(copies: Copies, blocks: Tensor, wanted: Tensor) -> Tensor:
    """The states [wanted positions, width] that predict them: those of the row before.

    The row before a block's first token is a finished one, as it is in decoding: it is the clean copy's.
    """
    before = max(0, copies.first - 1)
    inside = blocks[:, before + 1 :] == blocks[:, before:-1]
    noised = copies.noised[:, :-1]
    if copies.first:
        noised = torch.nn.functional.pad(noised, (0, 0, 1, 0))
    states = torch.where(inside[..., None], noised, copies.clean[:, before:-1])
    return states[wanted[:, before + 1 :]]
