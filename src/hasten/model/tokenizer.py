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
        return _reader(folder).from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} has no usable tokenizer: {reason}") from error


STAND_INS = {"DreamTokenizer": "Qwen2Tokenizer"}
"""Tokenizers that checkpoints bring as code, which is never run, and transformers' class that reads the same files."""


GENERIC = ("llama", "llada", "Dream", "Fast_dLLM_Qwen", "sdar")
"""Architectures whose tokenizer is of the class that its own configuration names: what AutoTokenizer would come to, for
those that transformers does not know after a warning."""


def _reader(folder: Path) -> Any:
    """transformers' class that reads a folder's tokenizer.

    A checkpoint that names the generic class is read by it. So would AutoTokenizer decide, but it imports every
    configuration of transformers first, which takes longer than importing PyTorch. A checkpoint with code of its own is
    read by the class it names, too: AutoTokenizer would ask whether to run that code.
    """
    import transformers

    try:
        tokenizer, config = read_json(folder / "tokenizer_config.json"), read_json(folder / "config.json")
        name = str(tokenizer.get("tokenizer_class"))
        generic = name == "TokenizersBackend" and "auto_map" not in tokenizer and config.get("model_type") in GENERIC
        named = getattr(transformers, STAND_INS.get(name, name), None)
        usable = isinstance(named, type) and issubclass(named, transformers.PreTrainedTokenizerBase)
        if usable and (generic or "auto_map" in config):
            return named
    except UserError:
        # AutoTokenizer copes, or says what is wrong.
        pass
    return transformers.AutoTokenizer


def same_vocabulary(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same ids to the same tokens."""
    return bool(one.get_vocab() == other.get_vocab())
