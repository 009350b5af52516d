"""A checkpoint's weights on their way into a model: named pieces, which transforms may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hasten.errors import UserError
from hasten.model.config import ModelConfig
from hasten.model.linear import Linear


@dataclass(frozen=True)
class Blocks:
    """A matrix as a file stores it: in each row, block behind block of weights that share scales.

    Attributes:
        type: the format's name in GGUF, such as "Q4_1".
        rows: uint8 [outputs, bytes per row]; it may be the mapped file itself.
        inputs: weights per row.
    """

    type: str
    rows: Tensor
    inputs: int


@dataclass(frozen=True)
class Piece:
    """A weight, [outputs, inputs] of a linear layer, [channels] of a norm; and its bias [outputs], if it has one.

    Attributes:
        weight: of a stored piece expanded each time it is asked for, so that it takes no memory meanwhile.
        stored: the same weight as the checkpoint stores it, one matrix below the other, each of a type of its own; a
            backend may take these instead. Empty where the weight is plain, or another one was put in its place.

    Raises:
        UserError: a bias of another size.
    """

    weight: Tensor
    bias: Tensor | None = None
    stored: tuple[Blocks, ...] = field(default=(), init=False)

    @classmethod
    def of(cls, stored: tuple[Blocks, ...], expand: Callable[[], Tensor], bias: Tensor | None = None) -> Piece:
        """A stored piece; `expand` makes its weight."""
        piece = cls.__new__(cls)
        vars(piece).update(bias=bias, stored=stored, _expand=expand)
        piece._check()
        return piece

    def __getattr__(self, name: str) -> Tensor:
        # Python asks here for what is not set: a stored piece's weight.
        if name != "weight":
            raise AttributeError(name)
        expand: Callable[[], Tensor] = vars(self)["_expand"]
        return expand()

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        if self.bias is not None and self.bias.shape != self.shape[:1]:
            bias = list(self.bias.shape)
            raise UserError(f"a piece with a weight of {list(self.shape)} cannot have a bias of {bias}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, which is not expanded for that."""
        if not self.stored:
            return tuple(self.weight.shape)
        return sum(blocks.rows.shape[0] for blocks in self.stored), self.stored[0].inputs

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Piece:
        """The same in another dtype, and perhaps on another device; what is stored stays."""
        bias = None if self.bias is None else self.bias.to(device, dtype)
        if self.stored:
            return Piece.of(self.stored, lambda: self.weight.to(device, dtype), bias)
        return Piece(self.weight.to(device, dtype), bias)


@dataclass(frozen=True)
class Source:
    """Which linear layer: the name of its piece, and the number of the layer; None outside the layers."""

    name: str
    layer: int | None = None


HEAD = Source("head")


@dataclass(frozen=True)
class Pieces:
    """What one layer is made of, or what stands outside the layers.

    Attributes:
        config: of the model, as the checkpoint has it.
        layer: its number; None outside the layers.
        weights: of a layer `mixer_norm`, `qkv` (queries, keys and values one below the other), `query_norm` and
            `key_norm` where heads have norms, `attention_out`, `mlp_norm`, `gate_up` (gate above up), `down`, and
            `token_norm` where `qkv` reads the token beside a row as well (`PairedLayer`); outside `embedding`, `norm`,
            and `head` where it is not the embedding's matrix.
        linears: linear layers that are ready, by the same names; they go before weights.
        without: of `mixer_norm` and `norm` those that are left out on purpose.
    """

    config: ModelConfig
    layer: int | None
    weights: Mapping[str, Piece]
    linears: Mapping[str, Linear] = field(default_factory=dict)
    without: frozenset[str] = frozenset()


Transform = Callable[[Pieces], Pieces]
"""Is given what stands outside the layers first, then layer by layer, and returns what to build in their place.

Widths may change: how many heads a layer has, and how many channels its MLP and the residual stream, follows from what
comes back. The model gets the embedding's dtype.
"""


class Stored(Mapping[str, Piece]):
    """Pieces that are read each time they are asked for: what is not asked for takes no memory."""

    def __init__(self, read: Mapping[str, Callable[[], Piece]]) -> None:
        self._read = read

    def __getitem__(self, name: str) -> Piece:
        return self._read[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)

    def __contains__(self, name: object) -> bool:
        # Mapping's own would read the piece.
        return name in self._read
