"""A linear layer's weights in panels of 16 outputs, as `step.cpp` reads them: float32, bf16, int8 or int4."""

from __future__ import annotations

import ctypes
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.model.native.library import library, team
from hasten.model.native.structs import LinearStruct

Format = Literal["float32", "bfloat16", "int8", "int4"]
FORMATS: tuple[Format, ...] = ("float32", "bfloat16", "int8", "int4")
"""In the order of `enum Format`."""
LANES = 16
GROUP = 64
"""Inputs of an output that share a scale in int4."""
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
"""Int4: shares of a group's largest weight that are tried as the end of its scale."""


class PanelLinear:
    """y = x W^T + b with weights in panels. A row's result is the same bits beside any other rows.

    Products of float32 and bf16 weights are added in float32, with the inputs rounded to the weights' precision.
    int8 has a scale per output and one per row of inputs, which become int8 codes themselves; int4 a scale per 64
    inputs of an output, and one per 64 inputs of a row. Their products are exact integers.

    Args:
        weight: [outputs, inputs], any floating-point dtype.
        bias: [outputs] or None.
        format: of the panels.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, format: Format) -> None:
        self.format, self.dtype = format, weight.dtype
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.detach().float().contiguous()
        stored = format == "bfloat16" and weight.dtype == torch.bfloat16
        padded = _filled(weight.detach() if stored else weight.detach().float(), rows=2 * LANES)
        self.scales: Tensor | None = None
        self.sums: Tensor | None = None
        if format == "float32":
            self.panels = _interleave(padded, 1)
        elif format == "bfloat16":
            self.panels = _interleave(padded.bfloat16(), 2)
        elif format == "int8":
            codes, self.scales = quantise_int8(padded)
            self.panels, self.sums = _interleave(codes, 4), codes.sum(1, dtype=torch.int32)
        else:
            codes, scales = quantise_int4(padded)
            self.panels = _nibbles(codes)
            self.scales = scales.view(-1, LANES, scales.shape[1]).transpose(1, 2).contiguous()
        self.struct = LinearStruct(
            format=FORMATS.index(format),
            panels=self.panels.data_ptr(),
            scales=_address(self.scales),
            sums=_address(self.sums),
            bias=_address(self.bias),
            outputs=self.out_features,
            inputs=self.in_features,
        )

    def forward(self, rows: Tensor) -> Tensor:
        return self._apply(rows, None)

    def forward_add(self, rows: Tensor, residual: Tensor) -> Tensor:
        return self._apply(rows, residual)

    def _apply(self, rows: Tensor, residual: Tensor | None) -> Tensor:
        loaded = library()
        assert loaded is not None
        x = rows.float().contiguous()
        added = None if residual is None else residual.float().contiguous()
        out = torch.empty(x.shape[0], self.out_features)
        loaded.hasten_linear(
            *(ctypes.addressof(self.struct), team(), x.shape[0], x.data_ptr()),
            *(None if added is None else added.data_ptr(), out.data_ptr()),
        )
        return out.to(rows.dtype)

    def dequant(self) -> Tensor:
        """The weights that the panels stand for, [outputs, inputs]."""
        if self.format == "float32" or self.format == "bfloat16":
            weight = _apart(self.panels)
        elif self.format == "int8":
            assert self.scales is not None
            weight = _apart(self.panels) * self.scales.unsqueeze(1)
        else:
            assert self.scales is not None
            scales = self.scales.transpose(1, 2).reshape(-1, self.scales.shape[1]).float()
            weight = (_codes(self.panels) - 8) * scales.repeat_interleave(GROUP, 1)
        return weight[: self.out_features, : self.in_features].to(self.dtype).contiguous()

    def nbytes(self) -> int:
        # Without the zeros that fill the last panels.
        share = self.out_features / (self.panels.shape[0] * LANES)
        parts = (self.panels, self.scales, self.sums)
        return round(share * sum(part.nbytes for part in parts if part is not None)) + (
            0 if self.bias is None else self.bias.nbytes
        )


def _address(part: Tensor | None) -> int | None:
    return None if part is None else part.data_ptr()


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [outputs, inputs] from -127 to 127 and float32 scales [outputs], by each output's largest weight."""
    scales = weight.abs().amax(1) / 127
    codes = (weight / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).round()
    return codes.clamp(-127, 127).to(torch.int8), scales


def quantise_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [outputs, inputs padded to groups] from 0 to 15 for -8 to 7, and bf16 scales [outputs, groups].

    The weight of largest magnitude in a group is -8 at the end of the scale; ends nearer to zero are tried, too, and
    the one with the least squared error is taken. Codes are found with the rounded scale.
    """
    groups = F.pad(weight, (0, -weight.shape[1] % GROUP)).view(weight.shape[0], -1, GROUP)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    best = torch.full_like(largest, torch.nan)
    codes, scales = torch.full_like(groups, 8), torch.ones_like(largest)
    for share in SHRINK:
        scale = (largest * (-share / 8)).bfloat16().float()
        tried = (groups / scale).nan_to_num(0).round().clamp(-8, 7)
        error = (tried * scale - groups).square().sum(2, keepdim=True)
        # The first end is taken in any case: the squares of very large weights overflow.
        better = ~(error >= best)
        best = torch.where(better, error, best)
        codes, scales = torch.where(better, tried + 8, codes), torch.where(better, scale, scales)
    return codes.flatten(1).to(torch.uint8), scales.squeeze(2).bfloat16()


def _interleave(matrix: Tensor, inputs: int) -> Tensor:
    """[outputs, n] to [outputs / 16, n / inputs, 16, inputs]: so many inputs of one output lie side by side.

    Zeros fill the last 16 words of inputs.
    """
    matrix = _filled(matrix, columns=LANES * inputs)
    return matrix.view(-1, LANES, matrix.shape[1] // inputs, inputs).transpose(1, 2).contiguous()


def _filled(matrix: Tensor, rows: int = 1, columns: int = 1) -> Tensor:
    """A matrix with zeros up to multiples of these; itself where it needs none, as large ones are slow to copy."""
    missing = (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows)
    return F.pad(matrix, missing) if any(missing) else matrix


def _apart(panels: Tensor) -> Tensor:
    """Back from `_interleave`."""
    return panels.transpose(1, 2).reshape(panels.shape[0] * LANES, -1)


def _nibbles(codes: Tensor) -> Tensor:
    """Two codes per byte: of eight inputs, the first four in the lower halves."""
    both = codes.view(-1, LANES, codes.shape[1] // 8, 2, 4)
    return (both[:, :, :, 0] | both[:, :, :, 1] << 4).transpose(1, 2).contiguous()


def _codes(panels: Tensor) -> Tensor:
    """Back from `_nibbles`, as int16 [outputs, inputs]."""
    both = panels.transpose(1, 2)
    return torch.stack([both & 15, both >> 4], 3).reshape(panels.shape[0] * LANES, -1).short()
