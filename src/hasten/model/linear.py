"""Linear layers as objects: storage may change (packed, quantised) without the model noticing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear(Protocol):
    """y = x W^T + b over rows."""

    in_features: int
    out_features: int

    def forward(self, rows: Tensor) -> Tensor:
        """[rows, in_features] -> [rows, out_features]."""

    def forward_add(self, rows: Tensor, residual: Tensor) -> Tensor:
        """`residual + forward(rows)`, fused where the storage can."""

    def dequant(self) -> Tensor:
        """The weight [out_features, in_features] as the model's dtype."""

    def nbytes(self) -> int:
        """Bytes of weights one forward pass reads."""


class DenseLinear:
    """A plain weight matrix on any device."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape

    def forward(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight, self.bias)

    def forward_add(self, rows: Tensor, residual: Tensor) -> Tensor:
        return residual + self.forward(rows)

    def dequant(self) -> Tensor:
        return self.weight

    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


class StackedLinear:
    """Matrices below one another, each stored in its own way: outputs of the same rows, side by side."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.parts = tuple(parts)
        self.in_features = parts[0].in_features
        self.out_features = sum(part.out_features for part in parts)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.cat([part.forward(rows) for part in self.parts], -1)

    def forward_add(self, rows: Tensor, residual: Tensor) -> Tensor:
        return residual + self.forward(rows)

    def dequant(self) -> Tensor:
        return torch.cat([part.dequant() for part in self.parts])

    def nbytes(self) -> int:
        return sum(part.nbytes() for part in self.parts)


class PackedLinear:
    """A weight in oneDNN's blocked layout: on CPU about twice as fast as the plain one for 1 to 32 rows.

    The plain weight is not kept; `dequant` unpacks it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype, self.bias = weight.dtype, bias
        self._nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 8)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        return out

    def forward_add(self, rows: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, residual, self._packed, self.bias, "add")
        return out

    def dequant(self) -> Tensor:
        weight: Tensor = self._packed.to_dense()
        return weight

    def nbytes(self) -> int:
        return self._nbytes


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can hold this weight packed and run it natively on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def fastest_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The fastest exact storage for a dense weight on its device."""
    return PackedLinear(weight, bias) if can_pack(weight) else DenseLinear(weight, bias)
