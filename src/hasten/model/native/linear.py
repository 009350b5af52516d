"""A linear layer's weights in panels of 16 outputs, as `step.cpp` reads them: float32 or bf16.

What comes in blocks becomes panels in `blocks.py`.
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
from hasten.model.pages import placed

Format = Literal["float32", "bfloat16"]
FORMATS: tuple[Format, ...] = ("float32", "bfloat16")
BlockFormat = Literal["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"]
BLOCK_FORMATS: tuple[BlockFormat, ...] = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
"""By their names in GGUF."""
_NUMBERS = {name: number for number, name in enumerate((*FORMATS, *BLOCK_FORMATS))}
"""In the order of `enum Format`."""
LANES = 16


class Panels(ABC):
    """y = x W^T + b with weights in panels. A row's result is the same bits beside any other rows.

    Args:
        format: of the panels.
        shape: outputs and inputs.
        dtype: of the weights that the panels stand for.
        panels, scales: what `struct Linear` says of the format; panels in their first dimension.
        bias: [outputs] or None.
        turned: whether the weights are those of turned inputs (`struct Linear`).
    """

    def __init__(
        self,
        format: Format | BlockFormat,
        shape: tuple[int, int],
        dtype: torch.dtype,
        panels: Tensor,
        scales: Tensor | None,
        bias: Tensor | None,
        turned: bool = False,
    ) -> None:
        self.format, self.dtype, self.turned = format, dtype, turned
        self.out_features, self.in_features = shape
        self.panels, self.scales = panels, scales
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self.struct = LinearStruct(
            format=_NUMBERS[format],
            panels=panels.data_ptr(),
            scales=_address(scales),
            bias=_address(self.bias),
            outputs=self.out_features,
            inputs=self.in_features,
            turned=turned,
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
        scales = 0 if self.scales is None else self.scales.nbytes
        bias = 0 if self.bias is None else self.bias.nbytes
        return round(share * (self.panels.nbytes + scales)) + bias


class PanelLinear(Panels):
    """Panels of a dense weight: products are added in float32, with the inputs rounded to the weights' precision.

    Args:
        weight: [outputs, inputs], any floating-point dtype.
        bias: [outputs] or None.
        format: of the panels.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, format: Format) -> None:
        stored = format == "bfloat16" and weight.dtype == torch.bfloat16
        padded = filled(weight.detach() if stored else weight.detach().float(), rows=2 * LANES)
        panels = interleave(padded, 1) if format == "float32" else interleave(padded.bfloat16(), 2)
        outputs, inputs = weight.shape
        super().__init__(format, (outputs, inputs), weight.dtype, placed(panels), None, bias)

    def dequant(self) -> Tensor:
        return apart(self.panels)[: self.out_features, : self.in_features].to(self.dtype).contiguous()


def _address(part: Tensor | None) -> int | None:
    return None if part is None else part.data_ptr()


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
