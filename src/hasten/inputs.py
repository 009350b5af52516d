"""What callers give as a prompt: text, token ids of any library, messages of a chat, or several of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from hasten.engine.prompt import Embedded, Segment
from hasten.engine.sampling.values import shown, text, whole
from hasten.errors import UserError

Messages = Sequence[Mapping[str, Any]]
Ids = Sequence[Segment]


def prompts(given: Any, encode: Callable[[str], Ids], converse: Callable[[Messages], Ids]) -> list[Ids]:
    """One prompt or several, as what the engine reads.

    A prompt is text; token ids (a list, an array or a tensor), among them perhaps embeddings; the messages of a chat;
    or a mapping that has one of these: `prompt`, `prompt_token_ids`, `messages`, or a tokenizer's `input_ids`. Arrays
    of two axes, and a tokenizer's output for several texts, are several prompts; what its attention mask hides is no
    part of them.

    Args:
        encode: token ids of a text.
        converse: token ids of a conversation.

    Raises:
        UserError: it is none of these.
    """
    reader = _Reader(encode, converse)
    if isinstance(given, Mapping) and "input_ids" in given:
        return reader.tokenized(given)
    if not _is_message(given):
        given = listed(given)
        if isinstance(given, (list, tuple)) and not (given and all(map(_is_message, given))) and not _has_ids(given):
            return [reader.one(each) for each in given]
    return [reader.one(given)]


@dataclass(frozen=True)
class _Reader:
    """Reads single prompts: see `prompts`."""

    encode: Callable[[str], Ids]
    converse: Callable[[Messages], Ids]

    def one(self, given: Any) -> Ids:
        given = listed(given)
        if isinstance(given, str):
            return self.encode(text("the prompt", given))
        if isinstance(given, Mapping):
            return self._mapped(given)
        if isinstance(given, (list, tuple, range)):
            if given and all(map(_is_message, given)):
                return self.converse(cast(Messages, given))
            return _ids(given)
        if given is None or isinstance(given, (bool, int, float, complex)):
            raise UserError(f"a prompt's token ids must be whole numbers in a list, not {shown(given)}")
        raise UserError(f"a prompt must be text, token ids or messages, not {shown(given)}")

    def _mapped(self, given: Mapping[str, Any]) -> Ids:
        if "input_ids" in given:
            found = self.tokenized(given)
            if len(found) != 1:
                raise UserError(f"input_ids within a list of prompts must be those of one prompt, not of {len(found)}")
            return found[0]
        if _is_message(given):
            return self.converse([given])
        for key, kind in (("prompt", str), ("prompt_token_ids", Sequence), ("messages", Sequence)):
            value = listed(given.get(key))
            if value is not None and isinstance(value, kind):
                return self.one(value)
        raise UserError("a prompt that is a mapping must have 'prompt', 'prompt_token_ids', 'messages' or 'input_ids'")

    def tokenized(self, given: Mapping[str, Any]) -> list[Ids]:
        """The prompts of a tokenizer's output."""
        rows, masks = listed(given["input_ids"]), listed(given.get("attention_mask"))
        if not isinstance(rows, Sequence) or isinstance(rows, (str, bytes)):
            raise UserError(f"input_ids must be token ids, not {shown(rows)}")
        if _has_ids(rows):
            rows, masks = [rows], None if masks is None else [masks]
        found = [_ids(listed(row)) for row in rows]
        if masks is None:
            return found
        try:
            return [
                [token for token, seen in zip(ids, listed(mask), strict=True) if seen]
                for ids, mask in zip(found, masks, strict=True)
            ]
        except (TypeError, ValueError):
            raise UserError("attention_mask must be of the shape of input_ids") from None


def listed(given: Any) -> Any:
    """Arrays and tensors as lists; everything else as it is.

    Raises:
        UserError: an array of more than two axes.
    """
    if not hasattr(given, "tolist") or isinstance(given, (str, bytes)):
        return given
    if getattr(given, "ndim", 1) > 2:
        raise UserError(f"token ids must be an array of one axis or two, not of {given.ndim}")
    return given.tolist()


def _ids(given: Any) -> Ids:
    """Token ids, and embeddings among them.

    Raises:
        UserError: something else.
    """
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise UserError(f"token ids must be a list of whole numbers, not {shown(given)}")
    if all(type(each) is int for each in given):
        return list(given)
    return [each if isinstance(each, Embedded) else _id(each) for each in given]


def _id(given: Any) -> int:
    """A token id; a float is none, even without a fraction."""
    if isinstance(given, float):
        raise UserError(f"token ids must be whole numbers, not {shown(given)}")
    return whole("a token id", given)


def _has_ids(given: Sequence[Any]) -> bool:
    """Whether a list is a prompt's token ids, not several prompts: one of them says so."""
    return any(isinstance(each, (int, Embedded, np.integer)) or getattr(each, "ndim", None) == 0 for each in given)


def _is_message(given: Any) -> bool:
    """Whether it is a message of a chat."""
    return isinstance(given, Mapping) and "role" in given


def messages(given: Any) -> list[dict[str, Any]]:
    """The messages of a conversation.

    Raises:
        UserError: they are none, or one without a role.
    """
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise UserError(f"messages must be a list of mappings with 'role' and 'content', not {shown(given)}")
    taken = list(given)
    for message in taken:
        if not _is_message(message):
            raise UserError(f"a message must be a mapping with 'role' and 'content', not {shown(message)}")
        text("the role of a message", message["role"])
    return [dict(message) for message in taken]
