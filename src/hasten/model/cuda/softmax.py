# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The softmax that the GPU's attention kernels share: running sums over chunks of slots, and the merge of splits.

A split's sums are of exp(score - base). With `phi`, that is the base instead of the running maximum: no split, and no
chunk, waits for another one's maximum, and splits are merged by adding them up (FlashDecoding++, arXiv 2311.01282).
Where a sum of weights leaves what float32 holds well, that split is computed again with the running maximum, for the
rows concerned; only these are rescaled when they are merged.

Where TRITON_INTERPRET=1 is set before Triton is imported, all kernels run on CPU, slowly.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """Take one chunk of slots into the running sums; lines that see none of it keep theirs to the bit.

    `phi` is a line's own [lines], and read if UNIFIED.
    """
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(seen, scores, float("-inf"))
    if UNIFIED:
        weights = tl.exp(scores - phi[:, None])
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
def _merge_kernel(
    partial,
    totals,
    bases,
    lengths,
    out,
    lse,
    units_per_split,
    per_split,
    UNITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    UNIFIED: tl.constexpr,
):
    """One program per unit: joins its splits, first to last. `UNITS` units share an entry of `lengths`."""
    unit = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, WIDTH)
    splits = tl.cdiv(tl.load(lengths + unit // UNITS), per_split)
    acc = tl.zeros([WIDTH], tl.float32)
    total, most = 0.0, float("-inf")
    plain = False
    if UNIFIED:
        number = tl.arange(0, SPLITS)
        most = tl.load(bases + unit)
        every = tl.load(bases + unit + number * units_per_split, mask=number < splits, other=most)
        plain = (tl.min(every, 0) == most) & (tl.max(every, 0) == most)
    if plain:
        for split in range(splits):
            at = unit + split * units_per_split
            acc += tl.load(partial + at * HEAD_DIM + channels, mask=channels < HEAD_DIM, other=0.0)
            total += tl.load(totals + at)
    else:
        most = float("-inf")
        for split in range(splits):
            at = unit + split * units_per_split
            own = tl.load(bases + at)
            higher = tl.maximum(most, own)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            share, shrink = tl.exp(own - base), tl.exp(most - base)
            value = tl.load(partial + at * HEAD_DIM + channels, mask=channels < HEAD_DIM, other=0.0)
            acc, total, most = acc * shrink + share * value, total * shrink + share * tl.load(totals + at), higher
    some = tl.where(total > 0, total, 1.0)
    tl.store(out + unit * HEAD_DIM + channels, acc / some, mask=channels < HEAD_DIM)
    tl.store(lse + unit, tl.where(total > 0, most + tl.log(some), float("-inf")))


@dataclass(frozen=True)
class Partial:
    """What the splits of each unit (a row's head) add up to, before they are merged; all float32.

    Attributes:
        sums: [splits, units, head_dim], of values times their weights.
        totals: [splits, units], of the weights.
        bases: [splits, units]: a weight is exp(score - base).
    """

    sums: Tensor
    totals: Tensor
    bases: Tensor

    @classmethod
    def empty(cls, like: Tensor, splits: int, units: int, head_dim: int) -> Partial:
        """Memory for them where `like` is, as it comes."""
        sums = like.new_empty((splits, units, head_dim), dtype=torch.float32)
        totals, bases = like.new_empty((2, splits, units), dtype=torch.float32)
        return cls(sums, totals, bases)

    def merge(self, lengths: Tensor, per_split: int, dtype: torch.dtype, unified: bool) -> tuple[Tensor, Tensor]:
        """Joins the splits of each unit, in order.

        Args:
            lengths: int32, the slots of each run of units of equal length: splits beyond them are not read.
            per_split: slots of a split.
            dtype: of the output.
            unified: many units may have the same base everywhere: theirs are added up as they are.

        Returns:
            (out [units, head_dim], lse float32 [units]); 0 and -inf where there are no slots.
        """
        splits, units, head_dim = self.sums.shape
        out, lse = self.sums.new_empty((units, head_dim), dtype=dtype), self.sums.new_empty(units)
        _merge_kernel[(units,)](
            self.sums,
            self.totals,
            self.bases,
            lengths,
            out,
            lse,
            units,
            per_split,
            UNITS=units // lengths.shape[0],
            HEAD_DIM=head_dim,
            WIDTH=tile_width(head_dim),
            SPLITS=int(triton.next_power_of_2(splits)),
            UNIFIED=unified,
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
