"""Memory on large pages, for what is read whole at every step: with pages of 4 KiB the processor looks for these.

Linux gives them where it is asked to (`madvise`), if it has some and the machine's owner does not forbid it; elsewhere
this is memory like any other.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

PAGE = 2**21
"""Bytes of a large page."""
PIECE = 16 * PAGE
"""Bytes that are asked for at once, and shared by what fits."""
LINE = 64
"""What is placed begins on a line of the cache."""

_lock = threading.Lock()
_rest = torch.empty(0, dtype=torch.uint8)


def on_large_pages(tensor: Tensor) -> Tensor:
    """A tensor of the CPU that nothing was written to yet, its memory on large pages as far as it fills any."""
    start = -(-tensor.data_ptr() // PAGE) * PAGE
    stop = (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE
    advise = _madvise()
    if advise is not None and start < stop:
        # It is advice: where it is not taken, nothing is wrong.
        advise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_HUGEPAGE)
    return tensor


def room(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor, behind what was placed before; its piece is given back with the last tensor in it."""
    global _rest
    size = prod(shape) * dtype.itemsize
    with _lock:
        if size > len(_rest):
            pages = max(PIECE, -(-size // PAGE) * PAGE)
            whole = on_large_pages(torch.empty(pages + PAGE, dtype=torch.uint8))
            start = -whole.data_ptr() % PAGE
            _rest = whole[start : start + pages]
        place, _rest = _rest[:size], _rest[-(-size // LINE) * LINE :]
    return place.view(dtype).view(*shape)


def placed(tensor: Tensor) -> Tensor:
    """A copy of a tensor in such memory."""
    return room(tensor.shape, tensor.dtype).copy_(tensor)


@cache
def _madvise() -> Any:
    return getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_HUGEPAGE") else None
