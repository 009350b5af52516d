"""What a training step hides: which positions of a batch become the mask token.

All functions are pure and take boolean tensors [rows, length]; `answer` marks the positions that may be hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 1e-3
"""Smallest chance of being hidden that a block may draw, as in LLaDA and Fast-dLLM v2."""


def uniform_count(answer: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hide k of a row's L positions, k uniform in 1..L (LLaDA, arXiv 2502.09992, eq. 6).

    The same expectation as hiding each position with probability t ~ U(0, 1), with less variance. The draws of k are
    spread evenly over the rows of a batch.

    Returns:
        hidden [rows, length], and the share k / L per row [rows, 1] (1 where nothing may be hidden).
    """
    rows, lengths = answer.shape[0], answer.sum(1)
    strata = torch.randperm(rows, generator=generator)
    spread = (strata + torch.rand(rows, generator=generator)) / rows
    counts = ((spread * lengths).long() + 1).clamp(max=lengths)
    share = torch.where(lengths > 0, counts / lengths.clamp(min=1), 1.0)
    return exactly(answer, counts, generator), share[:, None]


def exactly(answer: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """Hide `counts` [rows] positions of each row, every choice of them equally likely."""
    order = torch.rand(answer.shape, generator=generator).masked_fill(~answer, 2.0)
    return answer & (order.argsort(1).argsort(1) < counts[:, None])


def per_block(answer: Tensor, blocks: Tensor, generator: torch.Generator) -> Tensor:
    """Hide each position with a probability of its block's own, p = (1 - LEAST) t + LEAST, t ~ U(0, 1).

    Args:
        answer: [rows, length] boolean.
        blocks: number of each position's block [rows, length], from 0.
        generator: of the noise.
    """
    rows = answer.shape[0]
    levels = torch.rand(rows, int(blocks.max()) + 1, generator=generator)
    chance = ((1 - LEAST) * levels + LEAST).gather(1, blocks)
    return answer & (torch.rand(answer.shape, generator=generator) < chance)


def complement(answer: Tensor, hidden: Tensor) -> Tensor:
    """The second view of Fast-dLLM v2 (arXiv 2509.26328): hides what the first one left visible."""
    return answer & ~hidden


def draw_block(answer: Tensor, reach: Tensor, blocks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One block of each answer, as a decoder meets it that fills block after block.

    Args:
        answer: [rows, length] boolean, one run per row.
        reach: [rows]; the block holds one of the answer's first so many positions, each of them equally likely.
        blocks: number of each position's block [rows, length], not decreasing.
        generator: of the draw.

    Returns:
        the positions of the block, and those behind it, both [rows, length].
    """
    place = answer.long().argmax(1) + (torch.rand(reach.shape, generator=generator) * reach).long()
    drawn = blocks.gather(1, place.clamp(max=blocks.shape[1] - 1)[:, None])
    return answer & (blocks == drawn), answer & (blocks > drawn)


def two_views(segment: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hide about half of a segment in one view, and the rest in the other (dParallel, arXiv 2509.26488)."""
    first = segment & (torch.rand(segment.shape, generator=generator) < (1 - LEAST) / 2 + LEAST)
    return first, complement(segment, first)


def hide(ids: Tensor, hidden: Tensor, mask_id: int) -> Tensor:
    """The ids with the mask token where `hidden`."""
    return ids.masked_fill(hidden, mask_id)
