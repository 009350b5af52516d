"""The target's runners-up: the largest logits of verified rows."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.model.threads import on_one_thread


def groups_of(vocabulary: int, count: int) -> tuple[int, int]:
    """How many groups a row is searched in, and of how many logits, for so many of the largest; 0 where it is one."""
    group = math.gcd(vocabulary, 64)
    groups = vocabulary // group
    return (0, 0) if group < 16 or groups < 8 * count else (groups, group)


def largest(logits: Tensor, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The `count` largest logits of each row, largest first, and whose they are: [rows, vocabulary] to [rows, count]."""
    with on_one_thread():
        values, ids = _largest(logits, count)
    return values.cpu().numpy(), ids.cpu().numpy()


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    rows, vocabulary = logits.shape
    groups, group = groups_of(vocabulary, count)
    if not groups:
        values, ids = logits.topk(count)
        return values, ids
    # The largest lie in the groups with the largest maxima: most of a large vocabulary is looked at only once.
    # A group is every so manieth logit, so that maxima are taken of whole vectors.
    grouped = logits.reshape(rows, group, groups)
    maxima = torch.from_numpy(grouped.numpy().max(1)) if logits.device.type == "cpu" else grouped.amax(1)
    best = maxima.topk(count).indices
    values, within = grouped.gather(2, best.unsqueeze(1).expand(-1, group, -1)).reshape(rows, -1).topk(count)
    return values, within.div(count, rounding_mode="floor") * groups + best.gather(1, within % count)
