"""The likeliest of rows of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.model.native.library import library


def rank(logits: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the largest logits, falling, and what makes probabilities of them.

    On CPU one thread does it, and no team of threads is touched: a busy core beside would make it wait.

    Args:
        logits: [..., words], of any floating-point dtype.
        most: how many; fewer where there are fewer words.

    Returns:
        Logits, float32 [..., most]; which they are, int64 [..., most]; and the logarithm of the sum of all words'
        exponentials, float32 [...].
    """
    most, loaded = min(most, logits.shape[-1]), library() if logits.device.type == "cpu" else None
    logits = logits.float()
    if loaded is None or not most:
        best = logits.topk(most, -1)
        return best.values, best.indices, logits.logsumexp(-1)
    logits = logits.contiguous()
    rows, kept = logits.shape[:-1], (*logits.shape[:-1], most)
    values, places, masses = torch.empty(kept), torch.empty(kept, dtype=torch.int64), torch.empty(rows)
    loaded.hasten_rank(
        *(logits.data_ptr(), masses.numel(), logits.shape[-1], most),
        *(values.data_ptr(), places.data_ptr(), masses.data_ptr()),
    )
    return values, places, masses
