"""dParallel's loss (arXiv 2509.26488): certainty-forcing distillation on what the model itself has written."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from hasten.train.data import IGNORE
from hasten.train.diffusion.adapt import Adaptation, Text
from hasten.train.diffusion.corruption import draw_block, two_views
from hasten.train.diffusion.losses import certainty


def certainty_loss(
    recipe: Adaptation, model: LlamaForCausalLM, text: Text, block: int, beta: float, generator: torch.Generator
) -> Tensor:
    """The loss of two views of one block per text, whose later blocks are hidden and whose earlier ones are not.

    Args:
        recipe: how the model predicts; that of its own training.
        model: under distillation.
        text: prompts and the model's own answers.
        block: positions per block.
        beta: weight of the entropy.
        generator: of the noise.
    """
    lengths = (text.labels != IGNORE).sum(1)
    segment, later = draw_block(text.answer, lengths, torch.full_like(lengths, block), generator)
    loss = torch.zeros(())
    for view in two_views(segment, generator):
        loss = loss + certainty(recipe.predict(model, text, view | later, view), text.ids[view], beta)
    return loss
