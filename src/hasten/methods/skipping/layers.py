"""What methods that leave out parts of layers have in common."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hasten.engine import Target
from hasten.errors import UserError
from hasten.model import Decoder, Rows, Slots
from hasten.model.gate import Gate, compose_gated
from hasten.model.native import NativeBackend


def require_layers(target: Target, slug: str) -> Decoder:
    """The target's network, if parts of its layers can be left out.

    Raises:
        UserError: it is none, or has layers of another kind.
    """
    model = target.model
    if not isinstance(model, Decoder):
        raise UserError(f"{slug}: needs a transformer, since it skips parts of its layers")
    if not all(isinstance(layer.keeps, Slots) for layer in model.config.layers):
        raise UserError(f"{slug}: needs a model whose layers all attend, with keys and values of their own")
    return model


def gated(model: Decoder, rows: Rows, wanted: Sequence[int], gate: Gate, may: Tensor) -> tuple[Tensor, Tensor]:
    """A pass with a gate, natively where that can be. See `compose_gated`."""
    backend = model.backend
    compute = backend.gated if isinstance(backend, NativeBackend) else compose_gated
    return compute(model, rows, wanted, gate, may)
