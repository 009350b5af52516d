"""Blocks of GGUF formats for tests: of given weights where its Python package can make them, else any valid ones."""

from __future__ import annotations

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import Tensor

__all__ = ["expanded", "of_weights", "random_blocks"]

HALFS = {"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}
"""Where a block has float16 numbers."""


def random_blocks(format: str, outputs: int, inputs: int, seed: int = 0, scale: float = 0.01) -> Tensor:
    """uint8 [outputs, bytes per row]: any codes and sub-scales, float16 numbers of about this size."""
    generator = torch.Generator().manual_seed(seed)
    width, size = GGML_QUANT_SIZES[GGMLQuantizationType[format]]
    blocks = torch.randint(256, (outputs, inputs // width, size), dtype=torch.uint8, generator=generator)
    for place in HALFS[format]:
        numbers = torch.randn(outputs, inputs // width, 1, generator=generator) * scale
        blocks[..., place : place + 2] = numbers.half().view(torch.uint8)
    return blocks.flatten(1)


def of_weights(format: str, weight: Tensor) -> Tensor:
    """The blocks that stand for a weight: Q8_0, Q4_0, Q4_1."""
    return torch.from_numpy(quants.quantize(weight.numpy(), GGMLQuantizationType[format]))


def expanded(format: str, blocks: Tensor) -> Tensor:
    """The float32 weights of blocks."""
    return torch.from_numpy(quants.dequantize(blocks.numpy(), GGMLQuantizationType[format]))
