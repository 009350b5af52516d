# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The softmax that the GPU's attention kernels share: running sums over chunks of slots, and the merge of splits.

With `phi`, weights are exp(score - phi) instead of exp(score - running maximum): no split, and no chunk, waits for
another one's maximum (FlashDecoding++, arXiv 2311.01282). Where a sum of weights leaves what float32 holds well, that
split is computed again with the running maximum, for the rows concerned.

Where TRITON_INTERPRET=1 is set before Triton is imported, all kernels run on CPU, slowly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT = 256
"""Slots of one program: part of the order of sums, so the same for every length."""
# Between these, a sum of weights neither has overflowed nor has lost terms that matter: e^-60 and e^60.
LEAST, MOST = tl.constexpr(8.75651e-27), tl.constexpr(1.14200e26)

TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def advance(acc, total, most, queries, keys, values, seen, scale, phi, UNIFIED: tl.constexpr):
    """Take one chunk of slots into the running sums; lines that see none of it keep theirs to the bit."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(seen, scores, float("-inf"))
    if UNIFIED:
        weights = tl.exp(scores - phi)
    else:
        higher = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(most - base)
        acc, total, most = acc * shrink[:, None], total * shrink, higher
    total += tl.sum(weights, 1)
    acc += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return acc, total, most


@triton.jit
def close(acc, total, most, phi, UNIFIED: tl.constexpr):
    """(normalised output, log-sum-exp) of running sums; 0 and -inf for lines that saw nothing."""
    some = tl.where(total > 0, total, 1.0)
    reference = phi if UNIFIED else most
    lse = tl.where(total > 0, reference + tl.log(some), float("-inf"))
    return acc / some[:, None], lse


@triton.jit
def _merge_kernel(
    partial,
    partial_lse,
    lengths,
    out,
    lse,
    units_per_split,
    per_split,
    UNITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program per unit: joins its splits, first to last. `UNITS` units share an entry of `lengths`."""
    unit = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, WIDTH)
    splits = tl.cdiv(tl.load(lengths + unit // UNITS), per_split)
    acc = tl.zeros([WIDTH], tl.float32)
    total, most = 0.0, float("-inf")
    for split in range(splits):
        at = unit + split * units_per_split
        own = tl.load(partial_lse + at)
        higher = tl.maximum(most, own)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share, shrink = tl.exp(own - base), tl.exp(most - base)
        value = tl.load(partial + at * HEAD_DIM + channels, mask=channels < HEAD_DIM, other=0.0)
        acc, total, most = acc * shrink + share * value, total * shrink + share, higher
    some = tl.where(total > 0, total, 1.0)
    tl.store(out + unit * HEAD_DIM + channels, acc / some, mask=channels < HEAD_DIM)
    tl.store(lse + unit, tl.where(total > 0, most + tl.log(some), float("-inf")))


def merge_splits(
    partial: Tensor, partial_lse: Tensor, lengths: Tensor, per_split: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Joins the splits of each unit (a row's head), in order.

    Args:
        partial: float32 [splits, units, head_dim], normalised outputs. partial_lse: float32 [splits, units].
        lengths: int32, the slots of each run of units of equal length: splits beyond them are not read.
        per_split: slots of a split.
        dtype: of the output.

    Returns:
        (out [units, head_dim], lse float32 [units]); 0 and -inf where there are no slots.
    """
    _, units, head_dim = partial.shape
    out, lse = partial.new_empty((units, head_dim), dtype=dtype), partial.new_empty(units)
    _merge_kernel[(units,)](
        partial,
        partial_lse,
        lengths,
        out,
        lse,
        units,
        per_split,
        UNITS=units // lengths.shape[0],
        HEAD_DIM=head_dim,
        WIDTH=tile_width(head_dim),
        num_warps=1,
    )
    return out, lse


def chunk_slots(head_dim: int, dtype: torch.dtype) -> int:
    """Slots of one matrix product: 16 KB of keys, so that several stages of them fit into shared memory."""
    return min(64, max(16, 16384 // (tile_width(head_dim) * dtype.itemsize)))


def tile_width(head_dim: int) -> int:
    """Channels of a tile, which must be a power of two."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def check_phi(phi: float | None, dtype: torch.dtype) -> None:
    """Refuse a unified maximum where it cannot be exact.

    Raises:
        ValueError: for float16, which has no room for weights that are not at most 1.
    """
    if phi is not None and dtype == torch.float16:
        raise ValueError("a unified maximum needs bfloat16 or float32: weights overflow float16")
