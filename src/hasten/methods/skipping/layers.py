"""What methods that leave out parts of layers need of a model."""

from __future__ import annotations

from hasten.engine import Target
from hasten.errors import UserError
from hasten.model import Decoder, Slots


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
