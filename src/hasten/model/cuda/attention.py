# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Attention of few rows over the cache's own memory on a GPU, in Triton.

The slots that a row sees are counted in order: first the committed ones, then those pending rows that its tree lets it
see. A program takes `SPLIT` of them for the rows of one tile and all query heads that share a key head, so a key is
read once for these; a second kernel merges the splits. Chunks and splits begin at fixed counts,
and a row's sums run in that order alone: its result never depends on the rows beside it, nor on where in a tree it
stands.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.model.cuda.softmax import LEAST, MOST, SPLIT, TL_DTYPES, Partial, advance, chunk_slots, tile_width
from hasten.model.cuda.unified import Unified

MAX_PENDING = 1024
"""Pending rows up to which a span may have a mask."""
TILE_WORDS = 3
"""Words of a tile: first row, rows, span."""
SPAN_WORDS = 7
"""Words of a span: first row, pending rows before it, committed slots, its mask's address and row stride, first view,
views.

The mask is bytes [rows, pending], from the first row on; address 0 means causal.
"""
VIEW_WORDS = 3
"""Words of a view: number of its first slot in the sequence, address and capacity of its block's storage."""

_SPLIT = tl.constexpr(SPLIT)
_PENDING = tl.constexpr(MAX_PENDING)
_TILE = tl.constexpr(TILE_WORDS)
_SPAN = tl.constexpr(SPAN_WORDS)
_VIEW = tl.constexpr(VIEW_WORDS)
_NO_SLOT = tl.constexpr(2**62)


@triton.jit
def slot_addresses(views, held, slots, plane, planes, ROW_BYTES: tl.constexpr, VIEWS: tl.constexpr):
    """Addresses of the keys and the values of a sequence's slots, in one plane (layer and key head) of its blocks."""
    keys = tl.zeros_like(slots).to(tl.int64)
    values = keys
    for view in tl.static_range(VIEWS):
        first = tl.load(views + view * _VIEW, mask=view < held, other=_NO_SLOT)
        storage = tl.load(views + view * _VIEW + 1, mask=view < held, other=0)
        capacity = tl.load(views + view * _VIEW + 2, mask=view < held, other=0)
        here = storage + (plane * capacity + slots - first) * ROW_BYTES
        keys = tl.where(slots >= first, here, keys)
        values = tl.where(slots >= first, here + planes * capacity * ROW_BYTES, values)
    return keys, values


@triton.jit
def _read(addresses, there, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """[slots, WIDTH] keys or values at these addresses, zeros where nothing is there."""
    channels = tl.arange(0, WIDTH)
    # Rows of 16 bytes and more are aligned to 16; the compiler cannot see that through an address.
    aligned: tl.constexpr = HEAD_DIM * DTYPE.primitive_bitwidth % 128 == 0
    rows = addresses.to(tl.pointer_type(DTYPE))
    if aligned:
        rows = tl.multiple_of(rows, [16])
    return tl.load(rows[:, None] + channels[None, :], there[:, None] & (channels < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _walk(
    queries,
    visible,
    owners,
    table,
    rows,
    low,
    cut,
    high,
    committed,
    views,
    held,
    plane,
    planes,
    scale,
    phi,
    HEAD_DIM: tl.constexpr,
    DTYPE: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    VIEWS: tl.constexpr,
    UNIFIED: tl.constexpr,
):
    """Sums of a tile over the slots counted low .. high; from `cut` on, every row counts slots of its own."""
    row_bytes: tl.constexpr = HEAD_DIM * DTYPE.primitive_bitwidth // 8
    acc = tl.zeros([LINES, WIDTH], tl.float32)
    total = tl.zeros([LINES], tl.float32)
    most = tl.full([LINES], float("-inf"), tl.float32)
    for start in range(low, cut, CHUNK):
        order = start + tl.arange(0, CHUNK)
        at, values_at = slot_addresses(views, held, order, plane, planes, row_bytes, VIEWS)
        keys = _read(at, order < high, HEAD_DIM, WIDTH, DTYPE)
        values = _read(values_at, order < high, HEAD_DIM, WIDTH, DTYPE)
        seen = order[None, :] < visible[:, None]
        acc, total, most = advance(acc, total, most, queries, keys, values, seen, scale, phi, UNIFIED)
    if cut < high:
        for row in range(rows):
            own = tl.max(tl.where(owners == row, visible, 0), 0)
            for start in range(cut, high, CHUNK):
                order = start + tl.arange(0, CHUNK)
                there = order < own
                waiting = there & (order >= committed)
                place = tl.load(table + row * _PENDING + order - committed, mask=waiting, other=0)
                slots = tl.where(waiting, committed + place, order)
                at, values_at = slot_addresses(views, held, slots, plane, planes, row_bytes, VIEWS)
                keys = _read(at, there, HEAD_DIM, WIDTH, DTYPE)
                values = _read(values_at, there, HEAD_DIM, WIDTH, DTYPE)
                seen = there[None, :] & (owners == row)[:, None]
                acc, total, most = advance(acc, total, most, queries, keys, values, seen, scale, phi, UNIFIED)
    return acc, total, most


# A value of 1 or a multiple of 16 would each be compiled anew.
@triton.jit(do_not_specialize=["layer"])
def _cache_kernel(
    queries,
    tiles,
    spans,
    views,
    visible,
    table,
    sums,
    totals,
    bases,
    units_per_split,
    layer,
    layers,
    scale,
    phis,
    ranges,
    counts,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DTYPE: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    VIEWS: tl.constexpr,
    UNIFIED: tl.constexpr,
):
    """One program per (tile of a span's rows, key head, split); see `attend_cache`."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, rows = tl.load(tiles + tile * _TILE), tl.load(tiles + tile * _TILE + 1)
    span = tl.load(tiles + tile * _TILE + 2)
    group: tl.constexpr = HEADS // KV_HEADS
    lines, channels = tl.arange(0, LINES), tl.arange(0, WIDTH)
    owners = lines // group
    used = owners < rows
    seen = tl.load(visible + first + owners, mask=used, other=0)
    low = split * _SPLIT
    longest = tl.max(seen, 0)
    if low >= longest:
        return
    high = tl.minimum(longest, low + _SPLIT)
    words = spans + span * _SPAN
    committed, mask = tl.load(words + 2), tl.load(words + 3)
    own_views, held = views + tl.load(words + 5) * _VIEW, tl.load(words + 6)
    # The chunk that holds the first pending row is the first one in which the rows of a tree part ways.
    cut = high
    if mask != 0:
        cut = tl.minimum(high, tl.maximum(low, (committed // CHUNK * CHUNK).to(tl.int32)))
    units = (first + owners) * HEADS + kv_head * group + lines % group
    inside = used[:, None] & (channels < HEAD_DIM)[None, :]
    query = tl.load(queries + units[:, None] * HEAD_DIM + channels[None, :], mask=inside, other=0.0)
    plane, planes = layer * KV_HEADS + kv_head, layers * KV_HEADS
    own_table = table + first * _PENDING
    failed = seen > low
    acc = tl.zeros([LINES, WIDTH], tl.float32)
    total = tl.zeros([LINES], tl.float32)
    phi = total
    base = total
    at_head = layer * HEADS + kv_head * group + lines % group
    calibrated = False
    if UNIFIED:
        phi = tl.load(phis + at_head)
        # All query heads of a key head have one, or none.
        calibrated = tl.max(phi, 0) < float("inf")
    if calibrated:
        acc, total, _ = _walk(
            query, seen, owners, own_table, rows, low, cut, high, committed, own_views, held, plane, planes, scale, phi,
            HEAD_DIM, DTYPE, LINES, WIDTH, CHUNK, VIEWS, True,
        )  # fmt: skip
        base = phi
        tl.atomic_add(counts + 2 * at_head, 1, mask=failed)
        failed = failed & ((total > LEAST) & (total < MOST) == 0)
        tl.atomic_add(counts + 2 * at_head + 1, 1, mask=failed)
    if tl.max(failed.to(tl.int32), 0) > 0:
        exact, exact_total, most = _walk(
            query, seen, owners, own_table, rows, low, cut, high, committed, own_views, held, plane, planes, scale, phi,
            HEAD_DIM, DTYPE, LINES, WIDTH, CHUNK, VIEWS, False,
        )  # fmt: skip
        acc, base = tl.where(failed[:, None], exact, acc), tl.where(failed, most, base)
        total = tl.where(failed, exact_total, total)
        if UNIFIED:
            lse = most + tl.log(tl.where(failed, exact_total, 1.0))
            # NaN is no part of a range.
            known = failed & (calibrated == 0) & (tl.abs(lse) < float("inf"))
            tl.atomic_min(ranges + 2 * at_head, lse, mask=known)
            tl.atomic_max(ranges + 2 * at_head + 1, lse, mask=known)
    units += split.to(tl.int64) * units_per_split
    tl.store(sums + units[:, None] * HEAD_DIM + channels[None, :], acc, mask=inside)
    tl.store(totals + units, total, mask=used)
    tl.store(bases + units, base, mask=used)


@dataclass(frozen=True)
class Shape:
    """What all attention layers of a model have: `dtype` is that of queries, keys and values."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def lines(self) -> int:
        """Rows of a tile's matrix products: query heads of one key head, times the rows of a tile."""
        return max(16, int(triton.next_power_of_2(self.heads // self.kv_heads)))

    @property
    def tile(self) -> int:
        """Rows of a span that one program serves."""
        return self.lines // (self.heads // self.kv_heads)


@dataclass(frozen=True)
class Packed:
    """What attention needs to know of a pass, on the device; R is its number of rows, padding included.

    Attributes:
        tiles: int64 [R, TILE_WORDS]; unused ones have 0 rows.
        spans: int64 [R, SPAN_WORDS]. views: int64 [any, VIEW_WORDS].
        visible: int32 [R], slots that each row sees; 0 for padding.
        table: int32 [R, MAX_PENDING], for spans with a mask: the pending rows that each row sees, in order.
        splits, view_count: bounds over all spans.
    """

    tiles: Tensor
    spans: Tensor
    views: Tensor
    visible: Tensor
    table: Tensor
    splits: int
    view_count: int


def attend_cache(queries: Tensor, packed: Packed, shape: Shape, layer: int, unified: Unified | None = None) -> Tensor:
    """Attention of a packed pass over the cache's own memory.

    Args:
        queries: [R, heads, head_dim], rotated; this pass's keys and values are in the cache.
        packed: the pass.
        shape: of the layers.
        layer: which one.
        unified: the heads' unified maxima, or None for running maxima everywhere.

    Returns:
        [R, heads * head_dim] in the queries' dtype; zeros for padding.
    """
    rows, units = queries.shape[0], queries.shape[0] * shape.heads
    width = tile_width(shape.head_dim)
    partial = Partial.empty(queries, packed.splits, units, shape.head_dim)
    memory = [partial.totals] * 3 if unified is None else [unified.phi, unified.ranges, unified.counts]
    _cache_kernel[(rows, shape.kv_heads, packed.splits)](
        queries,
        packed.tiles,
        packed.spans,
        packed.views,
        packed.visible,
        packed.table,
        partial.sums,
        partial.totals,
        partial.bases,
        units,
        layer,
        shape.layers,
        shape.head_dim**-0.5,
        *memory,
        HEADS=shape.heads,
        KV_HEADS=shape.kv_heads,
        HEAD_DIM=shape.head_dim,
        DTYPE=TL_DTYPES[shape.dtype],
        LINES=shape.lines,
        WIDTH=width,
        CHUNK=chunk_slots(shape.head_dim, shape.dtype),
        VIEWS=packed.view_count,
        UNIFIED=unified is not None,
        num_warps=4,
        num_stages=2,
    )
    out, _ = partial.merge(packed.visible, SPLIT, queries.dtype, unified is not None)
    return out.view(rows, -1)
