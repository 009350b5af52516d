"""Token ids to text, as they arrive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    """Text of ids without special tokens."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text
