"""The target's runners-up: the largest logits of verified rows."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.engine.sampling.native.library import library
from hasten.model.threads import on_one_thread


def largest(logits: Tensor, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The `count` largest logits of each row, largest first, and whose they are: [rows, vocabulary] to [rows, count].

    On the thread that calls: those of a team would be waited for.
    """
    native = library()
    if native is None or logits.device.type != "cpu" or logits.dtype != torch.float32 or logits.stride(1) != 1:
        with on_one_thread():
            return _by_groups(logits, count)
    rows, vocabulary = logits.shape
    values, ids = np.empty((rows, count), np.float32), np.empty((rows, count), np.int64)
    native.hasten_leaders(
        logits.data_ptr(), rows, logits.stride(0), vocabulary, count, values.ctypes.data, ids.ctypes.data
    )
    return values, ids


def groups_of(vocabulary: int, count: int) -> tuple[int, int]:
    """How many groups a row is searched in, and of how many logits, for so many of the largest; 0 where it is one."""
    group = math.gcd(vocabulary, 64)
    groups = vocabulary // group
    return (0, 0) if group < 16 or groups < 8 * count else (groups, group)


def _by_groups(logits: Tensor, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Largest logits lie in the groups with the largest maxima: most of a large vocabulary is looked at only once."""
    rows, vocabulary = logits.shape
    groups, group = groups_of(vocabulary, count)
    if not groups:
        values, ids = logits.topk(count)
        return values.cpu().numpy(), ids.cpu().numpy()
    grouped = logits.reshape(rows, groups, group)
    best = grouped.amax(-1).topk(count).indices
    values, within = grouped.gather(1, best.unsqueeze(-1).expand(-1, -1, group)).reshape(rows, -1).topk(count)
    return values.cpu().numpy(), (best.gather(1, within // group) * group + within % group).cpu().numpy()
