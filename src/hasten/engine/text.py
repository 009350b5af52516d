"""Token ids to text, as they arrive and all at once: the same text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

INCOMPLETE = "�"
CHARACTER = 4
"""Bytes of one, at most; a token that is shown adds one at least."""


class Detokenizer:
    """Turns a growing list of ids into text without ever showing half a character.

    Decoding a window that starts a few tokens back keeps the cost per token constant and the spaces right.

    Args:
        skip_special: leave special tokens out.
    """

    def __init__(self, tokenizer: Any, skip_special: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._hidden = set(special_tokens(tokenizer).values()) if skip_special else set()
        self._ids: list[int] = []
        self._window = self._read = 0
        self.text = ""

    def push(self, token: int) -> str:
        """Append one token and return the text it completes (empty while a character is incomplete)."""
        if token in self._hidden:
            return ""
        self._ids.append(token)
        before, after = self._decode(self._window, self._read), self._decode(self._window)
        read = len(self._ids)
        if after.endswith(INCOMPLETE):
            # Of more than a character, only the end can still become one.
            read -= CHARACTER
            if read <= self._read or not after.startswith(settled := self._decode(self._window, read)):
                return ""
            after = settled
        if len(after) <= len(before):
            return ""
        self._window, self._read = self._read, read
        fresh = after[len(before) :]
        self.text += fresh
        return fresh

    def flush(self) -> str:
        """What is still held back, incomplete as it is."""
        rest = self._decode(self._window)[len(self._decode(self._window, self._read)) :]
        self._window = self._read = len(self._ids)
        self.text += rest
        return rest

    def _decode(self, start: int, stop: int | None = None) -> str:
        return decode(self._tokenizer, self._ids[start:stop], self._skip)


def decode(tokenizer: Any, ids: Sequence[int], skip_special: bool = True) -> str:
    """Text of ids, by default without special tokens, as it stands: no space before punctuation is taken away."""
    whole = _byte_tokens(tokenizer).mended(ids)
    text: str = tokenizer.decode(whole, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
    return text


class _ByteTokens:
    """The tokens of a vocabulary that stand for a byte each, where no other token spells a character (byte fallback).

    Of a run of them that is no UTF-8, tokenizers make a replacement character of every byte, those of the whole
    characters in it, too.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.of: dict[int, int] = {}
        self.ids: list[int] = []
        self.skipped: set[int] = set()
        if not hasattr(tokenizer, "get_vocab"):
            return
        vocabulary = tokenizer.get_vocab()
        ids = [vocabulary.get(f"<0x{byte:02X}>") for byte in range(256)]
        # Elsewhere these names are text.
        if None in ids or tokenizer.decode([ids[0x41]]) != "A":
            return
        self.ids = ids
        self.of = {token: byte for byte, token in enumerate(ids)}
        self.skipped = set(special_tokens(tokenizer).values())

    def mended(self, ids: Sequence[int]) -> list[int]:
        """The ids, with what is no UTF-8 in each run of bytes replaced by the bytes of one replacement character."""
        if self.of.keys().isdisjoint(ids):
            return list(ids)
        mended: list[int] = []
        run = bytearray()
        for token in (*ids, None):
            if token in self.of:
                run.append(self.of[token])
            elif token not in self.skipped:
                mended += (self.ids[byte] for byte in run.decode(errors="replace").encode())
                run.clear()
                mended += [] if token is None else [token]
        return mended


_known: WeakKeyDictionary[Any, _ByteTokens] = WeakKeyDictionary()


def _byte_tokens(tokenizer: Any) -> _ByteTokens:
    """Those of a tokenizer, looked up once."""
    found = _known.get(tokenizer)
    if found is None:
        found = _known[tokenizer] = _ByteTokens(tokenizer)
    return found


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokens that `decode` leaves out, by their texts."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token.content: number for number, token in added.items() if token.special}
