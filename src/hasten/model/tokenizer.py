"""Tokenizers of checkpoints, by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hasten.errors import UserError
from hasten.model.checkpoint import read_json, resolve


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a checkpoint folder or hub id.

    Raises:
        UserError: none there, or it cannot be read.
    """
    folder = resolve(model)
    try:
        return _reader(folder).from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} has no usable tokenizer: {reason}") from error


def _reader(folder: Path) -> Any:
    """transformers' class that reads a folder's tokenizer.

    A Llama checkpoint that names the generic class is read by it. So would AutoTokenizer decide, but it imports every
    configuration of transformers first, which takes longer than importing PyTorch.
    """
    try:
        tokenizer = read_json(folder / "tokenizer_config.json")
        generic = tokenizer.get("tokenizer_class") == "TokenizersBackend" and "auto_map" not in tokenizer
        if generic and read_json(folder / "config.json").get("model_type") == "llama":
            from transformers import TokenizersBackend

            return TokenizersBackend
    except UserError:
        # AutoTokenizer copes, or says what is wrong.
        pass
    from transformers import AutoTokenizer

    return AutoTokenizer


def same_vocabulary(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same ids to the same tokens."""
    return bool(one.get_vocab() == other.get_vocab())
