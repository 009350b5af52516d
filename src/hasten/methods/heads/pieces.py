"""Matrices of heads in few bytes: in the blocks of 32 weights that GGUF has, and taken apart and put together so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hasten.errors import UserError
from hasten.model.native.blocks import KINDS, BlockLinear
from hasten.model.native.rounding import BLOCK, Rounded, round_to_blocks
from hasten.model.weights import Blocks, Piece

Store = Literal["bf16", "q8_0", "q4_1"]
STORES: tuple[Store, ...] = ("bf16", "q8_0", "q4_1")
ROUNDED: dict[str, Rounded] = {"q8_0": "Q8_0", "q4_1": "Q4_1"}
"""How stored blocks are called behind a tensor's name."""


def require_store(store: str) -> None:
    """Check how matrices are to be stored.

    Raises:
        UserError: in no such way.
    """
    if store not in STORES:
        raise UserError(f"store must be {', '.join(STORES[:-1])} or {STORES[-1]}, not {store!r}")


def rounded(weight: Tensor, store: str, bias: Tensor | None = None) -> Piece:
    """A trained matrix [outputs, inputs] as it will be stored; bf16 where rows are no whole blocks."""
    bias = None if bias is None else bias.detach().bfloat16()
    weight = weight.detach()
    if store in ROUNDED and weight.shape[1] % BLOCK == 0:
        return of_blocks(ROUNDED[store], round_to_blocks(ROUNDED[store], weight), bias)
    return Piece(weight.bfloat16(), bias)


def of_blocks(type: Rounded, rows: Tensor, bias: Tensor | None = None) -> Piece:
    """The piece of a matrix of whole blocks.

    Args:
        rows: uint8 [outputs, bytes per row].
    """
    return _stored((Blocks(type, rows, rows.shape[1] // KINDS[type].bytes * BLOCK),), bias)


def with_bias(piece: Piece, bias: Tensor | None) -> Piece:
    """The same matrix with this bias."""
    return _stored(piece.stored, bias) if piece.stored else Piece(piece.weight, bias)


def columns(piece: Piece, start: int, stop: int) -> Piece:
    """The part of a matrix that some of its inputs go through; stored blocks are cut between blocks only."""
    if not piece.stored:
        return Piece(piece.weight[:, start:stop])
    if start % BLOCK or stop % BLOCK:
        return Piece(piece.weight[:, start:stop])
    cut = []
    for blocks in piece.stored:
        size = KINDS[ROUNDED[blocks.type.lower()]].bytes
        cut.append(Blocks(blocks.type, blocks.rows[:, start // BLOCK * size : stop // BLOCK * size], stop - start))
    return _stored(tuple(cut), None)


def stacked(pieces: Sequence[Piece], bias: Tensor | None = None) -> Piece:
    """Matrices of the same inputs one below the other; their own biases are left out."""
    if all(piece.stored for piece in pieces):
        return _stored(tuple(blocks for piece in pieces for blocks in piece.stored), bias)
    return Piece(torch.cat([piece.weight for piece in pieces]), bias)


def require_finite(name: str, type: Rounded, rows: Tensor) -> None:
    """Look at the scales of stored blocks: if they are finite, all is.

    Raises:
        UserError: bytes that are no whole blocks, NaN or infinity.
    """
    kind = KINDS[type]
    if rows.ndim != 2 or rows.dtype != torch.uint8 or rows.shape[1] % kind.bytes or not rows.numel():
        raise UserError(f"{name} holds no whole blocks of {type}")
    scales = torch.unflatten(rows, 1, (-1, kind.bytes))[..., : 2 * kind.halfs].contiguous().view(torch.float16)
    if not scales.isfinite().all():
        raise UserError(f"{name} holds NaN or infinity: the file is damaged")


def _stored(stored: tuple[Blocks, ...], bias: Tensor | None) -> Piece:
    return Piece.of(stored, lambda: torch.cat([_expanded(blocks) for blocks in stored]), bias)


def _expanded(blocks: Blocks) -> Tensor:
    """float32 [outputs, inputs]."""
    format = ROUNDED[blocks.type.lower()]
    return BlockLinear(format, blocks.rows, blocks.inputs, None, torch.float32).dequant()
