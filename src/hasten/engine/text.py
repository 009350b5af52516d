"""Token ids to text, as they arrive and all at once: the same text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

INCOMPLETE = "�"


class Detokenizer:
    """Turns a growing list of ids into text without ever showing half a character.

    Decoding a window that starts a few tokens back keeps the cost per token constant and the spaces right.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._window = self._read = 0
        self.text = ""

    def push(self, token: int) -> str:
        """Append one token and return the text it completes (empty while a character is incomplete)."""
        self._ids.append(token)
        before = decode(self._tokenizer, self._ids[self._window : self._read])
        after = decode(self._tokenizer, self._ids[self._window :])
        if len(after) <= len(before) or after.endswith(INCOMPLETE):
            return ""
        self._window, self._read = self._read, len(self._ids)
        fresh = after[len(before) :]
        self.text += fresh
        return fresh

    def flush(self) -> str:
        """What is still held back, incomplete as it is."""
        rest = decode(self._tokenizer, self._ids[self._window :])[
            len(decode(self._tokenizer, self._ids[self._window : self._read])) :
        ]
        self._window = self._read = len(self._ids)
        self.text += rest
        return rest


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of ids without special tokens, as it stands: no space before punctuation is taken away."""
    whole = _byte_tokens(tokenizer).mended(ids)
    text: str = tokenizer.decode(whole, skip_special_tokens=True, clean_up_tokenization_spaces=False)
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
        self.skipped = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}

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
