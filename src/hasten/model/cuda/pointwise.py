# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""What lies between the matrix products of a step on a GPU, in Triton: few launches, each over all rows of the pass.

Rows of padding enter as zeros, see nothing, and write nothing into the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.model.cuda.attention import MAX_PENDING, SPAN_WORDS, VIEW_WORDS, Packed, Shape, slot_addresses
from hasten.model.cuda.softmax import TL_DTYPES
from hasten.model.layers import RMSNorm

_PENDING = tl.constexpr(MAX_PENDING)
_SPAN = tl.constexpr(SPAN_WORDS)
_VIEW = tl.constexpr(VIEW_WORDS)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _inverse_root(mean):
    """1 / sqrt(mean); NaN where it has overflowed: the zeros of a norm by infinity are finite, and look right."""
    return tl.where(mean <= _LARGEST, tl.rsqrt(mean), float("nan"))


@triton.jit
def _open_kernel(
    inputs,
    owners,
    spans,
    embedding,
    x,
    positions,
    visible,
    table,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program per row; see `open_pass`."""
    row = tl.program_id(0)
    span = tl.load(owners + row)
    channels = tl.arange(0, WIDTH)
    inside = channels < HIDDEN
    if span < 0:
        tl.store(x + row * HIDDEN + channels, tl.zeros([WIDTH], DTYPE), mask=inside)
        tl.store(positions + row, tl.full([], 0, tl.int64))
        tl.store(visible + row, 0)
        return
    token = tl.load(tl.load(inputs).to(tl.pointer_type(tl.int64)) + row)
    position = tl.load(tl.load(inputs + 1).to(tl.pointer_type(tl.int64)) + row)
    given = tl.load(inputs + 2).to(tl.pointer_type(DTYPE))
    source = given + row * HIDDEN if token < 0 else embedding + token * HIDDEN
    tl.store(x + row * HIDDEN + channels, tl.load(source + channels, mask=inside), mask=inside)
    tl.store(positions + row, position)

    words = spans + span * _SPAN
    number = row - tl.load(words)
    before, committed = tl.load(words + 1), tl.load(words + 2)
    mask, stride = tl.load(words + 3), tl.load(words + 4)
    count = before + number + 1
    if mask != 0:
        seen_by = (mask + number * stride).to(tl.pointer_type(tl.int8))
        count = before * 0
        for start in range(0, stride, 128):
            slots = start + tl.arange(0, 128)
            seen = (tl.load(seen_by + slots, mask=slots < stride, other=0) != 0).to(tl.int32)
            places = count + tl.cumsum(seen, 0) - 1
            tl.store(table + row * _PENDING + places, slots, mask=seen != 0)
            count += tl.sum(seen, 0)
    tl.store(visible + row, (committed + count).to(tl.int32))


def open_pass(inputs: Tensor, owners: Tensor, packed: Packed, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Embeds the rows and counts what each sees (`packed.visible`, `packed.table`).

    Args:
        inputs: int64 [3] addresses of tokens int64 [rows], positions int64 [rows], and embeddings [rows, hidden] in the
            model's dtype, read where the token is -1.
        owners: int64 [R] each row's span; -1 marks padding.
        packed: the pass.
        embedding: [vocabulary, hidden].

    Returns:
        ([R, hidden], positions int64 [R]).
    """
    rows, hidden = owners.shape[0], embedding.shape[1]
    x = embedding.new_empty((rows, hidden))
    positions = torch.empty_like(owners)
    _open_kernel[(rows,)](
        inputs,
        owners,
        packed.spans,
        embedding,
        x,
        positions,
        packed.visible,
        packed.table,
        HIDDEN=hidden,
        WIDTH=triton.next_power_of_2(hidden),
        DTYPE=TL_DTYPES[embedding.dtype],
    )
    return x, positions


@triton.jit(do_not_specialize=["layer"])
def _rotate_kernel(
    qkv,
    cos,
    sin,
    query_norm,
    key_norm,
    eps,
    owners,
    spans,
    views,
    queries,
    layer,
    layers,
    NORMS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    VIEWS: tl.constexpr,
):
    """One program per (row, head of qkv); see `rotate_and_store`."""
    row, head = tl.program_id(0), tl.program_id(1)
    span = tl.load(owners + row)
    if span < 0:
        return
    channels = tl.arange(0, WIDTH)
    inside = channels < HEAD_DIM
    source = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * HEAD_DIM
    x = tl.load(source + channels, mask=inside, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        partners = (channels + HEAD_DIM // 2) % HEAD_DIM
        other = tl.load(source + partners, mask=inside, other=0.0).to(tl.float32)
        if NORMS:
            weight = query_norm if head < HEADS else key_norm
            scale = _inverse_root(tl.sum(x * x, 0) / HEAD_DIM + eps)
            x *= scale * tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
            other *= scale * tl.load(weight + partners, mask=inside, other=0.0).to(tl.float32)
        x *= tl.load(cos + row * HEAD_DIM + channels, mask=inside, other=0.0).to(tl.float32)
        x += other * tl.load(sin + row * HEAD_DIM + channels, mask=inside, other=0.0).to(tl.float32)
    if head < HEADS:
        tl.store(queries + (row * HEADS + head) * HEAD_DIM + channels, x, mask=inside)
    else:
        words = spans + span * _SPAN
        slot = tl.load(words + 2) + tl.load(words + 1) + row - tl.load(words)
        own_views, held = views + tl.load(words + 5) * _VIEW, tl.load(words + 6)
        plane, planes = layer * KV_HEADS + (head - HEADS) % KV_HEADS, layers * KV_HEADS
        keys, values = slot_addresses(
            own_views, held, slot, plane, planes, HEAD_DIM * DTYPE.primitive_bitwidth // 8, VIEWS
        )
        address = keys if head < HEADS + KV_HEADS else values
        tl.store(address.to(tl.pointer_type(DTYPE)) + channels, x.to(DTYPE), mask=inside)


def rotate_and_store(
    qkv: Tensor,
    angles: tuple[Tensor, Tensor],
    norms: tuple[RMSNorm, RMSNorm] | None,
    owners: Tensor,
    packed: Packed,
    shape: Shape,
    layer: int,
) -> Tensor:
    """Norms (where the model has them) and rotates queries and keys, and stores keys and values in the cache.

    Args:
        qkv: [R, (heads + 2 kv_heads) * head_dim].
        angles: (cos, signed sin) as `Rotary.angles` gives them.
        norms: of queries and of keys.
        owners: as in `open_pass`.
        packed, shape, layer: as in `attend_cache`.

    Returns:
        Queries [R, heads, head_dim]; those of padding are undefined.
    """
    rows, width = owners.shape[0], triton.next_power_of_2(shape.head_dim)
    queries = qkv.new_empty((rows, shape.heads, shape.head_dim), dtype=shape.dtype)
    cos, sin = angles
    weights = (cos, cos) if norms is None else (norms[0].weight, norms[1].weight)
    _rotate_kernel[(rows, shape.heads + 2 * shape.kv_heads)](
        qkv,
        cos,
        sin,
        *weights,
        0.0 if norms is None else norms[0].eps,
        owners,
        packed.spans,
        packed.views,
        queries,
        layer,
        shape.layers,
        NORMS=norms is not None,
        HEADS=shape.heads,
        KV_HEADS=shape.kv_heads,
        HEAD_DIM=shape.head_dim,
        WIDTH=width,
        DTYPE=TL_DTYPES[shape.dtype],
        VIEWS=packed.view_count,
        num_warps=1,
    )
    return queries


@triton.jit
def _add_norm_kernel(x, y, weight, total, normed, eps, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """One program per row; see `add_norm`."""
    channels = tl.arange(0, WIDTH)
    inside = channels < HIDDEN
    at = tl.program_id(0) * HIDDEN + channels
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(y + at, mask=inside, other=0.0)
    stored = value.to(DTYPE)
    tl.store(total + at, stored, mask=inside)
    value = stored.to(tl.float32)
    scale = _inverse_root(tl.sum(value * value, 0) / HIDDEN + eps)
    scaled = value * scale * tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, scaled, mask=inside)


def add_norm(x: Tensor, y: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """(x + y, norm(x + y)), all [R, hidden]."""
    total, normed = torch.empty_like(x), torch.empty_like(x)
    rows, hidden = x.shape
    _add_norm_kernel[(rows,)](
        x,
        y,
        norm.weight,
        total,
        normed,
        norm.eps,
        HIDDEN=hidden,
        WIDTH=triton.next_power_of_2(hidden),
        DTYPE=TL_DTYPES[x.dtype],
        num_warps=8 if hidden > 2048 else 4,
    )
    return total, normed


@triton.jit
def _gate_kernel(gate_up, inner, FFN: tl.constexpr, BLOCK: tl.constexpr):
    """One program per (row, block of channels); see `gate`."""
    row, channels = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < FFN
    x = tl.load(gate_up + row * 2 * FFN + channels, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * FFN + FFN + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(inner + row * FFN + channels, x / (1.0 + tl.exp(-x)) * up, mask=inside)


def gate(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [R, 2 ffn] -> [R, ffn]."""
    rows, ffn = gate_up.shape[0], gate_up.shape[1] // 2
    inner = gate_up.new_empty((rows, ffn))
    block = min(1024, triton.next_power_of_2(ffn))
    _gate_kernel[(rows, triton.cdiv(ffn, block))](gate_up, inner, FFN=ffn, BLOCK=block)
    return inner
