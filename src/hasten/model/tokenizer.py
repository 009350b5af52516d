"""Tokenizers of checkpoints, by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hasten.errors import UserError
from hasten.model.checkpoint import resolve


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a checkpoint folder or hub id.

    Raises:
        UserError: none there, or it cannot be read.
    """
    from transformers import AutoTokenizer

    folder = resolve(model)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} has no usable tokenizer: {reason}") from error


def same_vocabulary(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same ids to the same tokens."""
    return bool(one.get_vocab() == other.get_vocab())
