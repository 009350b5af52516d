"""A pass in which the attention of consecutive layers reads one input, layer by layer on threads of their own.

See `grouped.h`. Threads of one team, not processes: weights and slots are shared, what a layer gives is where the next
one reads it, and a meeting of threads that spin is over in a microsecond.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64
from typing import NamedTuple

import torch
from torch import Tensor

from hasten.model.decoder import Decoder
from hasten.model.native.backend import parts, runs
from hasten.model.native.library import team
from hasten.model.native.structs import BatchStruct
from hasten.model.rows import Rows


class Spent(NamedTuple):
    """Seconds of a pass by groups of layers.

    Attributes:
        attention: of each layer; of one that stands alone, all of it.
        feed_forward: of each other layer.
        head: of the final norm and the head.
    """

    attention: list[float]
    feed_forward: list[float]
    head: float


def runs_grouped(model: Decoder, rows: Rows) -> bool:
    """Whether `grouped` knows all pieces of a model, what its rows are, and where their sequences keep slots."""
    if not runs(model):
        return False
    sequences = [span.sequence for span in rows.spans]
    plain = all(each.memory(group) is not None for each in sequences for group in range(len(each.layout.groups)))
    return plain and rows.embeddings is None and rows.beside is None and not rows.joins


@torch.inference_mode()
def grouped(
    model: Decoder, rows: Rows, wanted: Sequence[int] | None, sizes: Sequence[int], threads: int = 0
) -> tuple[Tensor, Spent]:
    """A pass of rows of which `runs_grouped` is true.

    Args:
        sizes: of the groups of consecutive layers: all layers in all.
        threads: that compute, a layer of a group each and the rest together; 0: as many as PyTorch's.

    Returns:
        Float32 logits [wanted rows, vocabulary], bit for bit the same on any number of threads; what it took.

    Raises:
        IndexError: a token that the embedding does not have.
    """
    loaded, backend, described = parts(model)
    assert sum(sizes) == len(model.layers)
    count, layers = rows.tokens.shape[0], len(model.layers)
    numbers = range(count) if wanted is None else [range(count)[number] for number in wanted]
    row_wanted, groups = (c_int64 * len(numbers))(*numbers), (c_int64 * len(sizes))(*sizes)
    spans, _, _masks = backend.spans(described, rows)
    tokens, positions = rows.tokens.contiguous(), rows.positions.contiguous()
    logits, spent = torch.empty(len(numbers), model.head.out_features), (c_int64 * (2 * layers + 1))()
    batch = BatchStruct(
        rows=count,
        tokens=tokens.data_ptr(),
        positions=positions.data_ptr(),
        axes=1 if positions.dim() == 1 else positions.shape[1],
        spans=len(spans),
        span=ctypes.addressof(spans),
        wanted=len(numbers),
        row_wanted=ctypes.addressof(row_wanted),
        logits=logits.data_ptr(),
    )
    addresses = ctypes.addressof(described), team(threads), ctypes.addressof(batch)
    if loaded.hasten_grouped(*addresses, len(groups), ctypes.addressof(groups), ctypes.addressof(spent)) < 0:
        raise IndexError(f"a token id is not below {model.embedding.shape[0]}, the size of the vocabulary")
    seconds = [nanoseconds / 1e9 for nanoseconds in spent]
    return logits, Spent(seconds[:layers], seconds[layers : 2 * layers], seconds[-1])
