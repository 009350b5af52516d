"""Tokenizers of checkpoints, light ones where these do, else transformers', and their chat templates."""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

from hasten.errors import UserError
from hasten.model import light_tokenizer
from hasten.model.checkpoint import WANTED_FILES, read_json, resolve


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a checkpoint folder, a GGUF file or a hub id.

    Raises:
        UserError: none there, or it cannot be read.
    """
    folder = resolve(model)
    if folder.is_file():
        from hasten.model import gguf

        return gguf.read_tokenizer(gguf.open_gguf(folder))
    for file in folder.iterdir():
        if any(map(file.match, WANTED_FILES)) and file.exists() and not (file.is_file() or file.is_dir()):
            # A pipe or a device would be read for ever.
            raise UserError(f"cannot read {file}: it is no file")
    light = light_tokenizer.read(folder, lambda: _complete(folder)) if _is_generic(folder) else None
    return _complete(folder) if light is None else light


def _complete(folder: Path) -> Any:
    """transformers' tokenizer of a folder.

    Raises:
        UserError: none there, or it cannot be read.
    """
    try:
        return _checked(_reader(folder).from_pretrained(folder, trust_remote_code=False))
    except Exception as error:
        # What a file holds that is of another kind than transformers expects raises whatever comes first.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} has no usable tokenizer: {reason}") from error


def _checked(tokenizer: Any) -> Any:
    """A tokenizer after its first use: what is wrong with some settings shows only then."""
    tokenizer.decode(tokenizer("a", verbose=False)["input_ids"], skip_special_tokens=True)
    return tokenizer


STAND_INS = {"DreamTokenizer": "Qwen2Tokenizer"}
"""Tokenizers that checkpoints bring as code, which is never run, and transformers' class that reads the same files."""


GENERIC = ("llama", "llada", "Dream", "Fast_dLLM_Qwen", "sdar")
"""Architectures whose tokenizer is of the class that its own configuration names: what AutoTokenizer would come to, for
those that transformers does not know after a warning."""


def _is_generic(folder: Path) -> bool:
    """Whether a checkpoint names transformers' generic class for a tokenizer, and needs no code of its own."""
    try:
        tokenizer, config = read_json(folder / "tokenizer_config.json"), read_json(folder / "config.json")
    except UserError:
        return False
    named = tokenizer.get("tokenizer_class") == "TokenizersBackend" and "auto_map" not in tokenizer
    return named and config.get("model_type") in GENERIC


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
        named = getattr(transformers, STAND_INS.get(name, name), None)
        usable = isinstance(named, type) and issubclass(named, transformers.PreTrainedTokenizerBase)
        if usable and (_is_generic(folder) or "auto_map" in config):
            return named
    except UserError:
        # AutoTokenizer copes, or says what is wrong.
        pass
    return transformers.AutoTokenizer


def same_vocabulary(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same ids to the same tokens."""
    return bool(one.get_vocab() == other.get_vocab())


def vocabulary_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's tokens and ids: the same for those that `same_vocabulary` finds the same."""
    tokens = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def with_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """A chat message whose content is text, also where it came in parts, `[{"type": "text", "text": ...}, ...]`.

    Templates of models that read text only expect it so. Parts are lines, as vLLM and llama.cpp join them.

    Raises:
        UserError: a part that is no text, or content that is neither.
    """
    content = message.get("content")
    if content is None or isinstance(content, str):
        return dict(message)
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise UserError(f"the content of a message must be text, or a list of its parts, not {type(content).__name__}")
    for part in content:
        if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise UserError(f"a message has a part of type {part.get('type')!r}; only parts with text are supported")
    return {**message, "content": "\n".join(part["text"] for part in content)}


TEMPLATE_SECONDS = 10.0
"""After which a chat template is taken to loop for ever."""


@lru_cache
def _raises_to_powers(template: str) -> bool:
    """Whether a template has the operator `**`; before keywords of a call it stands behind a bracket or a comma."""
    from jinja2 import Environment

    tokens = [(kind, text) for _, kind, text in Environment().lex(template) if kind != "whitespace"]
    return any(token == ("operator", "**") and before not in ("(", ",") for (_, before), token in pairwise(tokens))


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of a conversation, ready for the assistant's turn, by the tokenizer's chat template.

    A template is a program that a checkpoint brings: it runs in a thread of its own, which can be ended between two of
    its steps. A power can be a step that never ends, and no template of a chat needs one.

    Raises:
        UserError: the template refuses the messages, takes more than `TEMPLATE_SECONDS`, or computes powers.
    """
    outcome: list[str | BaseException] = []

    def render() -> None:
        try:
            if _raises_to_powers(tokenizer.get_chat_template()):
                raise UserError("the chat template computes powers, which may never end: it was not run")
            outcome.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except BaseException as error:  # jinja raises whatever the template raises
            outcome.append(error)

    thread = Thread(target=render, daemon=True)
    thread.start()
    try:
        thread.join(TEMPLATE_SECONDS)
    finally:
        if thread.is_alive():
            assert thread.ident is not None
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    if not outcome:
        raise UserError(f"the chat template did not come to an end within {TEMPLATE_SECONDS:g} seconds")
    text = outcome[0]
    if isinstance(text, UserError):
        raise text
    if isinstance(text, BaseException):
        raise UserError(f"the chat template refuses the messages: {text}") from text
    return text
