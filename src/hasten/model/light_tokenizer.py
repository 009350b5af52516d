"""A tokenizer that needs no transformers: importing that takes longer than all else that a first token waits for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from hasten.errors import UserError
from hasten.model import chat_template
from hasten.model.checkpoint import read_json

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that transformers has names for."""

WITHOUT_EFFECT = {
    "add_bos_token", "add_eos_token", "backend", "is_local", "local_files_only", "model_max_length", "padding_side",
    "tokenizer_class", "truncation_side",
}  # fmt: skip
"""Keys of tokenizer_config.json that say nothing of ids and text where there is a tokenizer.json."""

UNREAD = ("special_tokens_map.json", "added_tokens.json", "additional_chat_templates")
"""What transformers reads beside a tokenizer.json, and `read` does not."""

RENDERED = {"add_generation_prompt": True, "tokenize": False}
"""How `render_chat` asks for the text of a conversation."""

PATCHED = 100_000
"""Vocabularies above that size may get another pre-tokenizer from transformers, which mends files of Mistral's."""


class LightTokenizer:
    """The part of transformers' interface that decoding needs, by the tokenizers library alone.

    What else is asked for comes from the complete tokenizer, which is read then.

    Args:
        backend: of the tokenizers library.
        named: special tokens by transformers' names.
        template: of chats, or None.
        read: gives transformers' tokenizer of the same files.
    """

    def __init__(self, backend: Any, named: dict[str, str], template: str | None, read: Callable[[], Any]) -> None:
        self.backend_tokenizer, self.chat_template, self._read = backend, template, read
        for name in NAMES:
            token = named.get(name)
            setattr(self, name, token)
            setattr(self, f"{name}_id", None if token is None else backend.token_to_id(token))
        self.all_special_ids = sorted({backend.token_to_id(token) for token in named.values()})

    @cached_property
    def complete(self) -> Any:
        """transformers' tokenizer."""
        return self._read()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            # What copying and the like ask for is nothing that the other one could answer for this one.
            raise AttributeError(name)
        return getattr(self.complete, name)

    def __call__(self, text: Any, add_special_tokens: bool = True, verbose: bool = True, **options: Any) -> Any:
        if not isinstance(text, str) or options:
            return self.complete(text, add_special_tokens=add_special_tokens, verbose=verbose, **options)
        return {"input_ids": self.encode(text, add_special_tokens)}

    def encode(self, text: str, add_special_tokens: bool = True, verbose: bool = True, **options: Any) -> Any:
        """Token ids of one text."""
        if not isinstance(text, str) or options:
            return self.complete.encode(text, add_special_tokens=add_special_tokens, verbose=verbose, **options)
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(
        self, ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False, **options: Any
    ) -> Any:
        """Text of ids."""
        if clean_up_tokenization_spaces:
            options["clean_up_tokenization_spaces"] = True
        if options or not isinstance(ids, list) or not all(type(each) is int for each in ids[:1]):
            return self.complete.decode(ids, skip_special_tokens=skip_special_tokens, **options)
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def get_vocab(self) -> dict[str, int]:
        """All tokens, added ones too, with their ids."""
        vocabulary: dict[str, int] = self.backend_tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Added tokens by their ids."""
        added: dict[int, Any] = self.backend_tokenizer.get_added_tokens_decoder()
        return added

    def get_added_vocab(self) -> dict[str, int]:
        """Ids of added tokens."""
        return {token.content: number for number, token in sorted(self.added_tokens_decoder.items())}

    def get_chat_template(self) -> str:
        """The chat template.

        Raises:
            ValueError: there is none.
        """
        if self.chat_template is None:
            raise ValueError("the tokenizer has no chat template")
        return self.chat_template

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        """Messages as the template renders them, in a sandbox."""
        template = self.get_chat_template()
        if options == RENDERED and chat_template.is_simple(template, messages):
            named = {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}
            return chat_template.render(template, messages, named)
        return self.complete.apply_chat_template(messages, chat_template=template, **options)


def read(folder: Path, complete: Callable[[], Any]) -> LightTokenizer | None:
    """The tokenizer of a folder that transformers' generic class reads; None where anything is not as simple as that.

    Then the complete one is needed: it copes, or says what is wrong.
    """
    try:
        config = read_json(folder / "tokenizer_config.json")
        named = {name: config.pop(name) for name in NAMES if name in config}
        named = {name: token for name, token in named.items() if token is not None}
        template = config.pop("chat_template", None)
        cleaned = config.pop("clean_up_tokenization_spaces", False)
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        plain = not cleaned and (template is None or isinstance(template, str)) and set(config) <= WITHOUT_EFFECT
        if not plain or any((folder / name).exists() for name in UNREAD):
            return None
        backend = _backend(folder / "tokenizer.json", named)
    except (UserError, OSError, UnicodeDecodeError):
        return None
    return None if backend is None else LightTokenizer(backend, named, template, complete)


def _backend(file: Path, named: dict[str, Any]) -> Any:
    """The library's tokenizer, if transformers would change nothing about it."""
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(file))
    except Exception:  # the library raises no other class
        return None
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    same = backend.truncation is None and backend.padding is None and backend.get_vocab_size() <= PATCHED
    known = all(isinstance(token, str) and token in special for token in named.values())
    return backend if same and known else None
