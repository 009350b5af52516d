"""LLaDA's recipe (arXiv 2502.09992, section 2.3): full attention, the prompt visible, the rest hidden at any rate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from hasten.train.data import IGNORE, Batch
from hasten.train.diffusion.adapt import Adaptation, Text, ceil_to, end_id, mask_id
from hasten.train.diffusion.corruption import draw_block, hide, uniform_count
from hasten.train.diffusion.layout import save_llada
from hasten.train.diffusion.losses import weighted_cross_entropy
from hasten.train.diffusion.masks import answer_blocks
from hasten.train.forward import hidden_states, logits

CANVASES = (8, 8, 8, 8, 16, 16, 32, 64, 128, 256)
"""Rows are padded to a multiple of one of these, drawn per batch, so that the model learns to end on any canvas."""
BLOCKS = (1, 2, 4, 8, 16, 32)
"""Sizes of blocks that a decoder may use. In small ones little stands behind a position: what cannot be read off there
must be worked out."""


@dataclass(frozen=True)
class MaskedDiffusion(Adaptation):
    """Masked diffusion over the whole canvas.

    `sequential` is the share of texts that are hidden as a decoder meets them that fills block after block (dParallel's
    corruption), rather than anywhere: a small model has too few steps to see enough of those among all the others.
    """

    lr: float = 2e-3
    sequential: float = 0.8

    attention: ClassVar[str] = "full"
    alignment: ClassVar[str] = "same"
    decoders: ClassVar[tuple[str, ...]] = ("threshold",)

    def loss(self, model: LlamaForCausalLM, batch: Batch, progress: float, generator: torch.Generator) -> Tensor:
        """Cross-entropy of hidden positions over the share that is hidden, per token of the answers.

        Of a text that is filled block after block, one block counts, and stands for all.
        """
        text = self.canvas(model, batch, generator)
        # Padding has no part in these, or long canvases would drown the answers.
        lengths = (text.labels != IGNORE).sum(1)
        sizes = torch.tensor(BLOCKS)[torch.randint(len(BLOCKS), lengths.shape, generator=generator)]
        blocks = answer_blocks(text.start, text.ids.shape[1], sizes[:, None], torch.zeros_like(lengths))
        block, later = draw_block(text.answer, lengths, blocks, generator)
        sequential = torch.rand(lengths.shape, generator=generator) < self.sequential
        segment = torch.where(sequential[:, None], block, text.answer)
        counted, share = uniform_count(segment, generator)
        hidden = counted | (later & sequential[:, None])
        # One block stands for all of its text's.
        scale = torch.where(sequential, lengths / segment.sum(1), 1.0)[:, None] / share
        predicted = self.predict(model, text, hidden, counted)
        return weighted_cross_entropy(predicted, text.ids[counted], scale.expand(counted.shape)[counted], lengths.sum())

    def predict(self, model: LlamaForCausalLM, text: Text, hidden: Tensor, wanted: Tensor) -> Tensor:
        """A row sees the whole canvas and predicts its own position."""
        states = hidden_states(model, hide(text.ids, hidden, mask_id(model)), None, None, self.dtype)
        return logits(model, states[wanted])

    def canvas(self, model: LlamaForCausalLM, batch: Batch, generator: torch.Generator) -> Text:
        """The batch on a canvas of random length, with fewer rows where it would pass `batch_tokens`."""
        multiple = CANVASES[int(torch.randint(len(CANVASES), (), generator=generator))]
        room = model.config.max_position_embeddings
        length = max(batch.ids.shape[1], min(ceil_to(batch.ids.shape[1], multiple), room))
        rows = max(1, self.batch_tokens // length)
        kept = torch.randperm(batch.ids.shape[0], generator=generator)[:rows]
        return Text.of(Batch(batch.ids[kept], batch.labels[kept]), length, end_id(model))

    def export(self, model: LlamaForCausalLM, folder: Path) -> None:
        """Write the model in LLaDA's layout."""
        save_llada(model, folder)
