"""A linear layer's weights in panels of 16 outputs, as `step.cpp` reads them: float32, bf16, int8 or int4.

What files store in blocks becomes panels in `blocks.py`.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.model.native.library import library, team
from hasten.model.native.structs import LinearStruct

Format = Literal["float32", "bfloat16", "int8", "int4"]
FORMATS: tuple[Format, ...] = ("float32", "bfloat16", "int8", "int4")
BlockFormat = Literal["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"]
BLOCK_FORMATS: tuple[BlockFormat, ...] = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
"""By their names in GGUF."""
_NUMBERS = {name: number for number, name in enumerate((*FORMATS, *BLOCK_FORMATS))}
"""In the order of `enum Format`."""
LANES = 16
GROUP = 64
"""Inputs of an output that share a scale in int4."""
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
"""Int4: shares of a group's largest weight that are tried as the end of its scale."""


class Panels(ABC):
    """y = x W^T + b with weights in panels. A row's result is the same bits beside any other rows.

    Args:
        format: of the panels.
        shape: outputs and inputs.
        dtype: of the weights that the panels stand for.
        panels, scales, sums: what `struct Linear` says of the format; panels in their first dimension.
        bias: [outputs] or None.
    """

    def __init__(
        self,
        format: Format | BlockFormat,
        shape: tuple[int, int],
        dtype: torch.dtype,
        panels: Tensor,
        scales: Tensor | None,
        sums: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        self.format, self.dtype = format, dtype
        self.out_features, self.in_features = shape
        self.panels, self.scales, self.sums = panels, scales, sums
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self.struct = LinearStruct(
            format=_NUMBERS[format],
            panels=panels.data_ptr(),
            scales=_address(scales),
            sums=_address(sums),
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

    @abstractmethod
    def dequant(self) -> Tensor:
        """The weights that the panels stand for, [outputs, inputs]."""

    def nbytes(self) -> int:
        # Without the zeros that fill the last panels.
        share = self.out_features / (self.panels.shape[0] * LANES)
        parts = (self.panels, self.scales, self.sums)
        return round(share * sum(part.nbytes for part in parts if part is not None)) + (
            0 if self.bias is None else self.bias.nbytes
        )


class PanelLinear(Panels):
    """Panels of a dense weight.

    Products of float32 and bf16 weights are added in float32, with the inputs rounded to the weights' precision.
    int8 has a scale per output and one per row of inputs, which become int8 codes themselves; int4 a scale per 64
    inputs of an output, and one per 64 inputs of a row. Their products are exact integers.

    Args:
        weight: [outputs, inputs], any floating-point dtype.
        bias: [outputs] or None.
        format: of the panels.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, format: Format) -> None:
        stored = format == "bfloat16" and weight.dtype == torch.bfloat16
        padded = filled(weight.detach() if stored else weight.detach().float(), rows=2 * LANES)
        scales: Tensor | None = None
        sums: Tensor | None = None
        if format == "float32":
            panels = interleave(padded, 1)
        elif format == "bfloat16":
            panels = interleave(padded.bfloat16(), 2)
        elif format == "int8":
            codes, scales = quantise_int8(padded)
            panels, sums = interleave(codes, 4), codes.sum(1, dtype=torch.int32)
        else:
            codes, scales = quantise_int4(padded)
            panels = nibbles(codes)
            scales = scales.view(-1, LANES, scales.shape[1]).transpose(1, 2).contiguous()
        outputs, inputs = weight.shape
        super().__init__(format, (outputs, inputs), weight.dtype, panels, scales, sums, bias)

    def dequant(self) -> Tensor:
        if self.format == "float32" or self.format == "bfloat16":
            weight = apart(self.panels)
        elif self.format == "int8":
            assert self.scales is not None
            weight = apart(self.panels) * self.scales.unsqueeze(1)
        else:
            assert self.scales is not None
            scales = self.scales.transpose(1, 2).reshape(-1, self.scales.shape[1]).float()
            weight = (codes_of(self.panels) - 8) * scales.repeat_interleave(GROUP, 1)
        return weight[: self.out_features, : self.in_features].to(self.dtype).contiguous()


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


def interleave(matrix: Tensor, inputs: int) -> Tensor:
    """[outputs, n] to [outputs / 16, n / inputs, 16, inputs]: so many inputs of one output lie side by side.

    Zeros fill the last 16 words of inputs.
    """
    matrix = filled(matrix, columns=LANES * inputs)
    return matrix.view(-1, LANES, matrix.shape[1] // inputs, inputs).transpose(1, 2).contiguous()


def filled(matrix: Tensor, rows: int = 1, columns: int = 1) -> Tensor:
    """A matrix with zeros up to multiples of these; itself where it needs none, as large ones are slow to copy."""
    missing = (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows)
    return F.pad(matrix, missing) if any(missing) else matrix


def apart(panels: Tensor) -> Tensor:
    """Back from `interleave`."""
    return panels.transpose(1, 2).reshape(panels.shape[0] * LANES, -1)


def nibbles(codes: Tensor) -> Tensor:
    """Two codes per byte: of eight inputs, the first four in the lower halves."""
    both = codes.view(-1, LANES, codes.shape[1] // 8, 2, 4)
    return (both[:, :, :, 0] | both[:, :, :, 1] << 4).transpose(1, 2).contiguous()


def codes_of(panels: Tensor) -> Tensor:
    """Back from `nibbles`, as int16 [outputs, inputs]."""
    both = panels.transpose(1, 2)
    return torch.stack([both & 15, both >> 4], 3).reshape(panels.shape[0] * LANES, -1).short()
