"""What linear layers read while a model runs: the inputs that calibration needs."""

from __future__ import annotations

from collections.abc import Callable, Container
from copy import copy
from dataclasses import replace

from torch import Tensor

from hasten.model.decoder import Decoder
from hasten.model.layers import Attention, GatedMLP, Layer
from hasten.model.linear import Linear
from hasten.model.weights import HEAD, Source

LINEARS = ("qkv", "attention_out", "gate_up", "down", "head")
"""Names of the pieces that are linear layers."""

Record = Callable[[Source, Tensor], None]
"""Is given rows [rows, inputs] as a linear layer is about to read them, of all sequences of a pass in its order."""


class RecordingLinear:
    """Another linear layer, which first tells what it is given."""

    def __init__(self, linear: Linear, source: Source, record: Record) -> None:
        self.linear, self.source, self.record = linear, source, record
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, rows: Tensor) -> Tensor:
        self.record(self.source, rows)
        return self.linear.forward(rows)

    def forward_add(self, rows: Tensor, residual: Tensor) -> Tensor:
        self.record(self.source, rows)
        return self.linear.forward_add(rows, residual)

    def dequant(self) -> Tensor:
        return self.linear.dequant()

    def nbytes(self) -> int:
        return self.linear.nbytes()


def recording(model: Decoder, record: Record, names: Container[str] = LINEARS) -> Decoder:
    """A model over the same weights whose linear layers are recorded; every pass of it is composed.

    Args:
        model: is left as it is.
        record: called in every pass, once per recorded layer. The head reads the wanted rows only.
        names: of the pieces to record, in every layer that has attention or a gated MLP.

    Raises:
        UserError: by `forward`, where the backend's numerics are invariant and a GPU runs it.
    """

    def wrapped(linear: Linear, source: Source) -> Linear:
        return RecordingLinear(linear, source, record) if source.name in names else linear

    def recorded(layer: Layer) -> Layer:
        layer, index = copy(layer), layer.index
        if isinstance(layer.mixer, Attention):
            layer.mixer = mixer = copy(layer.mixer)
            mixer.qkv = wrapped(mixer.qkv, Source("qkv", index))
            mixer.out = wrapped(mixer.out, Source("attention_out", index))
        if isinstance(layer.mlp, GatedMLP):
            layer.mlp = mlp = copy(layer.mlp)
            mlp.gate_up = wrapped(mlp.gate_up, Source("gate_up", index))
            mlp.down = wrapped(mlp.down, Source("down", index))
        return layer

    return replace(model, layers=[recorded(layer) for layer in model.layers], head=wrapped(model.head, HEAD))
