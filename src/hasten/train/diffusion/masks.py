"""Blocks of a text, and who sees whom when a noised copy of it is trained beside the clean one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def aligned_blocks(answer: Tensor, block: int) -> Tensor:
    """Block numbers [rows, length] counted from the start of the text, prompt or not, as Fast-dLLM v2 does."""
    return (torch.arange(answer.shape[1]) // block).expand(answer.shape)


def answer_blocks(start: Tensor, length: int, block: int | Tensor, offsets: Tensor) -> Tensor:
    """Block numbers [rows, length]: the prompt is block 0, those of the answer follow.

    A decoder's first block begins with the answer, and TiDAR's may begin anywhere, so offsets are drawn at random.

    Args:
        start: the answer's first position [rows].
        length: positions per row.
        block: positions per block, for all rows or for each [rows, 1].
        offsets: [rows] in 0..block-1: by how much the first block of the answer is shorter.
    """
    rank = torch.arange(length) - start[:, None]
    return torch.where(rank < 0, 0, 1 + (rank + offsets[:, None]) // block)


def two_copies(blocks: Tensor, first: int, context: Literal["causal", "block-causal"]) -> Tensor:
    """Which row sees which, of the noised copy and the clean one behind it.

    A noised row sees its own block in the noised copy and all earlier blocks in the clean one (BD3-LM, arXiv
    2503.09573). A clean row sees clean rows only: those up to itself (NBDiff, arXiv 2512.06776; TiDAR, arXiv
    2511.08923), or up to the end of its block (BD3-LM, Fast-dLLM v2).

    Args:
        blocks: number of each position's block [rows, length], not decreasing.
        first: the noised copy has the positions from here on; nothing is predicted before.
        context: how the clean copy attends.

    Returns:
        boolean [rows, n, n], n = 2 length - first, noised rows first; True where row i sees row j.
    """
    rows, length = blocks.shape
    query, key, noised = blocks[:, :, None], blocks[:, None, :], blocks[:, None, first:]
    own = torch.cat([noised == query[:, first:], key < query[:, first:]], 2)
    clean = torch.ones(rows, length, length, dtype=torch.bool).tril() if context == "causal" else key <= query
    return torch.cat([own, torch.cat([torch.zeros(rows, length, length - first, dtype=torch.bool), clean], 2)], 1)
