# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Attention over one part (`hasten.model.attention.Part`) on a GPU, in Triton: for prompts, and for composed parts."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.model.attention import reference_kernel
from hasten.model.cuda.softmax import (
    LEAST,
    MOST,
    SPLIT,
    TL_DTYPES,
    Partial,
    advance,
    check_phi,
    chunk_slots,
    tile_width,
)

MANY_ROWS = 64
"""More rows than this fill the device without splitting the keys."""


@triton.jit
def _walk_part(
    query,
    keys,
    values,
    mask,
    lines,
    rows,
    low,
    high,
    slots,
    key_slot,
    value_slot,
    scale,
    phi,
    MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIFIED: tl.constexpr,
):
    """Sums of a tile of rows over the slots low .. high of a part. MASK: 0 none, 1 additive, 2 causal."""
    channels = tl.arange(0, WIDTH)
    acc = tl.zeros([LINES, WIDTH], tl.float32)
    total = tl.zeros([LINES], tl.float32)
    most = tl.full([LINES], float("-inf"), tl.float32)
    for start in range(low, high, CHUNK):
        order = start + tl.arange(0, CHUNK)
        there = (order < high)[:, None] & (channels < HEAD_DIM)[None, :]
        key = tl.load(keys + order[:, None] * key_slot + channels[None, :], mask=there, other=0.0)
        value = tl.load(values + order[:, None] * value_slot + channels[None, :], mask=there, other=0.0)
        seen = (order < high)[None, :] & (lines < rows)[:, None]
        if MASK == 1:
            at = mask + lines[:, None].to(tl.int64) * slots + order[None, :]
            seen = seen & (tl.load(at, mask=seen, other=float("-inf")).to(tl.float32) == 0.0)
        if MASK == 2:
            seen = seen & (order[None, :] <= lines[:, None])
        acc, total, most = advance(acc, total, most, query, key, value, seen, scale, phi, UNIFIED)
    return acc, total, most


@triton.jit(do_not_specialize=["rows", "slots", "per_split"])
def _part_kernel(
    queries,
    keys,
    values,
    mask,
    sums,
    totals,
    bases,
    rows,
    slots,
    per_split,
    query_head,
    query_row,
    key_head,
    key_slot,
    value_head,
    value_slot,
    scale,
    phi,
    MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIFIED: tl.constexpr,
):
    """One program per (tile of rows, head, split) of a part; see `triton_kernel`."""
    tile, head, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    lines, channels = tile * LINES + tl.arange(0, LINES), tl.arange(0, WIDTH)
    inside = (lines < rows)[:, None] & (channels < HEAD_DIM)[None, :]
    at = queries + head * query_head + lines[:, None] * query_row + channels[None, :]
    query = tl.load(at, mask=inside, other=0.0)
    keys += head * key_head
    values += head * value_head
    low = split * per_split
    high = tl.minimum(slots, low + per_split)
    if MASK == 2:
        high = tl.minimum(high, (tile + 1) * LINES)
    unified = tl.zeros([LINES], tl.float32) + phi
    acc, total, base = _walk_part(
        query, keys, values, mask, lines, rows, low, high, slots, key_slot, value_slot, scale, unified,
        MASK, HEAD_DIM, LINES, WIDTH, CHUNK, UNIFIED,
    )  # fmt: skip
    if UNIFIED:
        base = unified
        # A row whose mask hides the whole split is computed twice, to the same nothing.
        failed = (lines < rows) & ((total > LEAST) & (total < MOST) == 0)
        if tl.max(failed.to(tl.int32), 0) > 0:
            exact, exact_total, most = _walk_part(
                query, keys, values, mask, lines, rows, low, high, slots, key_slot, value_slot, scale, unified,
                MASK, HEAD_DIM, LINES, WIDTH, CHUNK, False,
            )  # fmt: skip
            acc, base = tl.where(failed[:, None], exact, acc), tl.where(failed, most, base)
            total = tl.where(failed, exact_total, total)
    units = (split * tl.num_programs(1) + head) * rows + lines
    tl.store(sums + units[:, None] * HEAD_DIM + channels[None, :], acc, mask=inside)
    tl.store(totals + units, total, mask=lines < rows)
    tl.store(bases + units, base, mask=lines < rows)


def triton_kernel(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | Literal["causal"] | None,
    phi: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One part, as `hasten.model.attention.Kernel`; float64 goes to the reference.

    Additive masks hold 0 and -inf, as parts' do. With `phi`, a unified maximum near the scaled scores.
    """
    if queries.dtype not in TL_DTYPES or 0 in queries.shape or 0 in keys.shape:
        return reference_kernel(queries, keys, values, mask)
    check_phi(phi, queries.dtype)
    queries, keys, values = (each if each.stride(-1) == 1 else each.contiguous() for each in (queries, keys, values))
    heads, rows, head_dim = queries.shape
    slots, units, width = keys.shape[1], heads * rows, tile_width(head_dim)
    per_split = SPLIT if rows <= MANY_ROWS else slots
    splits = -(-slots // per_split)
    lines = 16 if rows <= MANY_ROWS else 64
    partial = Partial.empty(queries, splits, units, head_dim)
    additive = mask.contiguous() if isinstance(mask, Tensor) else partial.sums
    kind = 0 if mask is None else 1 if isinstance(mask, Tensor) else 2
    _part_kernel[(-(-rows // lines), heads, splits)](
        queries,
        keys,
        values,
        additive,
        partial.sums,
        partial.totals,
        partial.bases,
        rows,
        slots,
        per_split,
        queries.stride(0),
        queries.stride(1),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        head_dim**-0.5,
        phi or 0.0,
        MASK=kind,
        HEAD_DIM=head_dim,
        LINES=lines,
        WIDTH=width,
        CHUNK=chunk_slots(head_dim, queries.dtype),
        UNIFIED=phi is not None,
        num_warps=4,
        num_stages=2,
    )
    lengths = torch.full((1,), slots, dtype=torch.int32, device=queries.device)
    out, lse = partial.merge(lengths, per_split, queries.dtype, phi is not None)
    return out.view(heads, rows, head_dim), lse.view(heads, rows)
