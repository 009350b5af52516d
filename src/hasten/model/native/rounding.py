"""Dense weights rounded to blocks of 32, as GGUF files store them: int8 as Q8_0, int4 as Q4_1."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import sqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.errors import UserError
from hasten.model.threads import on_one_thread

Rounded = Literal["Q8_0", "Q4_1"]
BLOCK = 32
AT_ONCE = 2**17
"""Weights that are rounded together: what is made of them stays in the processor's cache."""
LARGEST = torch.finfo(torch.float16).max
"""Scales and minima are float16."""
ENDS = (15.0, 14.0, 16.0)
"""Q4_1: how many steps may lie between a block's least weight and its largest. Beyond 15 the outermost are cut."""


def round_to_blocks(format: Rounded, weight: Tensor, turned: bool = False) -> Tensor:
    """The blocks of a weight, uint8 [outputs, bytes per row].

    Args:
        format: of the blocks.
        weight: [outputs, inputs], any floating-point dtype. The last block of a row is filled with its last weight, or
            with zeros if turned.
        turned: whether to `turn` the blocks first.

    Raises:
        UserError: a weight that float16 cannot hold.
    """
    most = weight.abs().amax().item()
    if most > LARGEST:
        raise UserError(f"a weight of {most:.3g} is too large to be rounded: its block has a float16 scale")
    filled = F.pad(weight, (0, -weight.shape[1] % BLOCK), mode="constant" if turned else "replicate")
    filled = torch.unflatten(filled, 1, (-1, BLOCK))
    parts = torch.split(filled, max(1, AT_ONCE // weight.shape[1]))
    # As many small operations: a team of threads would wait for all its cores before each.
    with on_one_thread():
        floats = (turn(part.float()) if turned else part.float() for part in parts)
        return torch.cat([_ROUND[format](part).flatten(1) for part in floats])


def turn(blocks: Tensor) -> Tensor:
    """Blocks [..., 32] times Hadamard's matrix, whose rows have length 1; twice, and they are as they were.

    A block's products with inputs that are turned, too, are the same. Outliers among the inputs are shared out.
    """
    return torch.matmul(blocks, _hadamard().to(blocks.dtype))


@cache
def _hadamard() -> Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < BLOCK:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / sqrt(BLOCK)


def _q8_0(blocks: Tensor) -> Tensor:
    scales = (blocks.abs().amax(-1, keepdim=True) / 127).half()
    # A block without a scale has codes of zero.
    codes = (blocks / scales.float()).nan_to_num_(0).round_().clamp_(-127, 127)
    return _bytes(scales, codes.to(torch.int8))


def _q4_1(blocks: Tensor) -> Tensor:
    """Codes by several steps; for each, the scale and minimum of least squares, and the codes that these give."""
    least, most = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    total = blocks.sum(-1, keepdim=True)
    best = torch.full_like(total, torch.inf)
    codes, scales, minima = torch.zeros_like(blocks), torch.zeros_like(total), torch.zeros_like(total)
    for end in ENDS:
        tried = _codes(blocks, least, (most - least) / end)
        first, second = tried.sum(-1, keepdim=True), tried.square().sum(-1, keepdim=True)
        mixed = (tried * blocks).sum(-1, keepdim=True)
        # Where all codes are alike, there is nothing to scale.
        scale = (BLOCK * mixed - first * total).div_(BLOCK * second - first * first).nan_to_num_(0).half().float()
        minimum = ((total - scale * first) / BLOCK).half().float()
        tried = _codes(blocks, minimum, scale)
        error = (tried * scale).add_(minimum).sub_(blocks).square_().sum(-1, keepdim=True)
        better = error < best
        best, codes = torch.where(better, error, best), torch.where(better, tried, codes)
        scales, minima = torch.where(better, scale, scales), torch.where(better, minimum, minima)
    lower, upper = torch.split(codes.to(torch.uint8), BLOCK // 2, -1)
    return _bytes(scales.half(), minima.half(), lower | upper << 4)


def _codes(blocks: Tensor, minimum: Tensor, scale: Tensor) -> Tensor:
    """From 0 to 15, as float32; 0 without a scale."""
    return blocks.sub(minimum).div_(scale).nan_to_num_(0).round_().clamp_(0, 15)


def _bytes(*parts: Tensor) -> Tensor:
    return torch.cat([part.view(torch.uint8) for part in parts], -1)


_ROUND: dict[Rounded, Callable[[Tensor], Tensor]] = {"Q8_0": _q8_0, "Q4_1": _q4_1}
