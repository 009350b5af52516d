# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Products of few rows and a whole weight on a GPU, in Triton: a program reads the weights of its outputs once."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTOR_ROWS = 4
"""Rows that `vector` knows at most."""
FLAT_ROWS = 64
"""Rows that `flat` knows at most."""
LEAST_ROWS = 16
"""Rows of the smallest tile of matrix units in Triton."""


@triton.jit
def _read(pointers, lines, count, at, inputs):
    """[lines, at] of a matrix of `count` rows of `inputs`, zeros beyond them."""
    there = (lines < count)[:, None] & (at < inputs)[None, :]
    return tl.load(pointers + lines[:, None].to(tl.int64) * inputs + at[None, :], mask=there, other=0.0)


@triton.jit
def _write(acc, bias, out, lines, count, columns, outputs, BIAS: tl.constexpr):
    if BIAS:
        acc += tl.load(bias + columns, mask=columns < outputs, other=0.0).to(tl.float32)[None, :]
    there = (lines < count)[:, None] & (columns < outputs)[None, :]
    tl.store(out + lines[:, None].to(tl.int64) * outputs + columns[None, :], acc, mask=there)


@triton.jit(do_not_specialize=["count"])
def _flat_kernel(
    rows, weight, bias, out, count, outputs, inputs,
    LINES: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One program per block of outputs; the next chunk of weights is on its way while one is multiplied."""
    columns, lines = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, LINES)
    acc = tl.zeros([LINES, BLOCK], tl.float32)
    for start in range(0, inputs, CHUNK):
        at = start + tl.arange(0, CHUNK)
        weights = _read(weight, columns, outputs, at, inputs)
        acc += tl.dot(_read(rows, lines, count, at, inputs), tl.trans(weights), input_precision="ieee")
    _write(acc, bias, out, lines, count, columns, outputs, BIAS)


@triton.jit(do_not_specialize=["count"])
def _vector_kernel(
    rows, weight, bias, out, count, outputs, inputs,
    LINES: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One program per block of outputs, without matrix units."""
    columns, lines = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, LINES)
    acc = tl.zeros([LINES, BLOCK], tl.float32)
    for start in range(0, inputs, CHUNK):
        at = start + tl.arange(0, CHUNK)
        weights = _read(weight, columns, outputs, at, inputs).to(tl.float32)
        values = _read(rows, lines, count, at, inputs).to(tl.float32)
        acc += tl.sum(values[:, None, :] * weights[None, :, :], 2)
    _write(acc, bias, out, lines, count, columns, outputs, BIAS)


def flat(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows [1 to FLAT_ROWS, in] times weight [out, in], contiguous, with float32 sums: [rows, out] in their dtype.

    A block is the largest that still gives every processor one: larger ones read the rows less often.
    """
    lines = max(LEAST_ROWS, int(triton.next_power_of_2(rows.shape[0])))
    blocks = (block for block in (128, 64, 32) if weight.shape[0] >= block * _processors(weight.device))
    chunk = 128 // weight.element_size()
    return _launch(_flat_kernel, rows, weight, bias, lines, next(blocks, 16), chunk)


def vector(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same for 1 to VECTOR_ROWS rows."""
    lines = int(triton.next_power_of_2(rows.shape[0]))
    return _launch(_vector_kernel, rows, weight, bias, lines, 8, 512 // lines)


def _launch(
    kernel: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, lines: int, block: int, chunk: int
) -> Tensor:
    outputs, inputs = weight.shape
    rows = rows.contiguous()
    out = rows.new_empty((rows.shape[0], outputs))
    # Pieces of a model are also composed where another GPU is the current one.
    with torch.cuda.device_of(weight):
        kernel[(triton.cdiv(outputs, block),)](
            rows,
            weight,
            weight if bias is None else bias,
            out,
            rows.shape[0],
            outputs,
            inputs,
            LINES=lines,
            BLOCK=block,
            CHUNK=chunk,
            BIAS=bias is not None,
            num_warps=4,
            num_stages=3,
        )
    return out


@cache
def _processors(device: torch.device) -> int:
    """Of a GPU; in the interpreter, those of an A100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 108
