"""The tensors of a GGUF file, under the names of a Llama's checkpoint: plain, expanded, or as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from hasten.errors import UserError
from hasten.model.architectures.base import TENSORS
from hasten.model.checkpoint import Tensors
from hasten.model.config import ModelConfig
from hasten.model.gguf.file import GGUF, QUANTISED
from hasten.model.weights import Blocks, Piece

NAMES = {
    "embedding": "token_embd",
    "mixer_norm": "blk.{}.attn_norm",
    "query": "blk.{}.attn_q",
    "key": "blk.{}.attn_k",
    "value": "blk.{}.attn_v",
    "query_norm": "blk.{}.attn_q_norm",
    "key_norm": "blk.{}.attn_k_norm",
    "attention_out": "blk.{}.attn_output",
    "mlp_norm": "blk.{}.ffn_norm",
    "gate": "blk.{}.ffn_gate",
    "up": "blk.{}.ffn_up",
    "down": "blk.{}.ffn_down",
    "norm": "output_norm",
    "head": "output",
}
"""GGUF's names of the pieces, `{}` standing for the layer."""

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

SCALES = {
    "Q8_0": (0, 1),
    "Q4_0": (0, 1),
    "Q4_1": (0, 2),
    "Q5_0": (0, 1),
    "Q5_1": (0, 2),
    "Q2_K": (40, 42),
    "Q3_K": (54, 55),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (104, 105),
    "IQ4_NL": (0, 1),
}
"""Of a block, as numbers of 16 bits, those that are no integers: scales and minima. If they are finite, all is."""

EXPANDED = 2**22
"""Weights that are expanded at a time."""


class GGUFTensors(Tensors):
    """As `Tensors`, of a GGUF file.

    Args:
        file: the file.
        config: its own.
        dtype, device: what tensors become.
    """

    described_by = "metadata"

    def __init__(self, file: GGUF, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.folder, self.dtype, self.device = file.path, dtype, device
        self.file, self.config = file, config
        self.expanded = {}
        self._names = {
            f"{ours}.{part}".format(layer): f"{NAMES[piece]}.{part}".format(layer)
            for piece, ours in TENSORS.items()
            for part in ("weight", "bias")
            for layer in range(len(config.layers))
        }
        # Llamas are stored with the halves of each head's queries and keys interleaved.
        interleaved = file.text("general.architecture") == "llama"
        self._turned = {NAMES[piece].split(".")[-1] for piece in ("query", "key")} if interleaved else set()

    def __contains__(self, name: str) -> bool:
        return self.called(name) in self.file.tensors

    def called(self, name: str) -> str:
        return self._names.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[self.called(name)].shape

    def _read(self, name: str) -> Tensor:
        called = self.called(name)
        stored = self.file.tensors[called]
        if stored.type in PLAIN:
            rows = torch.from_numpy(self.file.rows(called)).view(PLAIN[stored.type])
            return self._half_split(called, rows).view(stored.shape)
        self.expanded[name] = stored.type
        return self._expand(self._blocks(called)).view(stored.shape)

    def piece(self, names: list[str], shapes: Sequence[tuple[int, ...]], bias: Tensor | None = None) -> Piece:
        """As `Tensors.piece`; a stored one where all are of quantised types."""
        for name, shape in zip(names, shapes, strict=True):
            self.require(name, *shape)
        called = [self.called(name) for name in names]
        if not all(self.file.tensors[name].type in QUANTISED for name in called):
            return super().piece(names, shapes, bias)
        return Piece.of(tuple(map(self._blocks, called)), partial(self.stacked, names, shapes), bias)

    def _blocks(self, called: str) -> Blocks:
        """A quantised matrix as it is stored.

        Raises:
            UserError: a scale is NaN or infinite.
        """
        stored, rows = self.file.tensors[called], self.file.rows(called)
        block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[stored.type]][1]
        scales = rows.reshape(-1, block_bytes).view("<f2")[:, slice(*SCALES[stored.type])]
        if not np.isfinite(scales).all():
            raise UserError(f"{called} in {self.folder} holds NaN or infinity: the checkpoint is damaged")
        return Blocks(stored.type, self._half_split(called, torch.from_numpy(rows)), stored.shape[-1])

    def _half_split(self, called: str, rows: Tensor) -> Tensor:
        """A tensor's rows in the order of Hugging Face checkpoints: a head's first half stands before its second.

        Raises:
            UserError: they are not those of whole heads.
        """
        parts = called.split(".")
        if len(parts) < 2 or parts[-2] not in self._turned:
            return rows
        # A bias is one row of bytes.
        flat = rows.view(-1, 1) if parts[-1] == "bias" else rows
        width = self.config.layers[0].slots.key_width
        if flat.shape[0] % width:
            raise UserError(f"{called} in {self.folder} has {flat.shape[0]} rows, no whole number of heads of {width}")
        heads = flat.view(-1, width // 2, 2, flat.shape[1])
        return heads.transpose(1, 2).reshape(rows.shape)

    def _expand(self, blocks: Blocks) -> Tensor:
        """[outputs, inputs] in the dtype that is asked for."""
        out = torch.empty(blocks.rows.shape[0], blocks.inputs, dtype=self.dtype)
        step, kind = max(1, EXPANDED // blocks.inputs), GGMLQuantizationType[blocks.type]
        for start in range(0, len(out), step):
            rows = blocks.rows[start : start + step]
            out[start : start + step] = torch.from_numpy(dequantize(rows.numpy(), kind))
        return out
