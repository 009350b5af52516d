"""The check that methods share which need a causal context: finished text of an autoregressive model, an open block."""

from __future__ import annotations

from typing import Literal

from hasten.engine import Target
from hasten.errors import UserError
from hasten.model import DiffusionConfig

RECIPES = {"shifted": "nbdiff", "same": "tidar"}
"""What trains such a model, by the position that a row predicts."""


def require_causal_context(target: Target, name: str, alignment: Literal["same", "shifted"]) -> DiffusionConfig:
    """How the model fills blocks behind a causal context, its rows predicting the positions that `name` needs.

    Args:
        name: the method, for the message.

    Raises:
        UserError: another model.
    """
    diffusion = target.model.config.diffusion
    if diffusion is None or (diffusion.attention, diffusion.alignment) != ("context-causal", alignment):
        raise UserError(
            f"{name} needs a model that fills masks behind a causal context (alignment {alignment!r}): "
            f"`hasten train {RECIPES[alignment]} --model MODEL --output FOLDER` makes one"
        )
    return diffusion
