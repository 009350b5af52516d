"""Token ids to text, as they arrive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "�"


class Detokenizer:
    """Turns a growing list of ids into text without ever showing half a character.

    Decoding a window that starts a few tokens back keeps the cost per token constant and the spaces right.

    Args:
        skip_special: leave special tokens out.
    """

    def __init__(self, tokenizer: Any, skip_special: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._ids: list[int] = []
        self._window = self._read = 0
        self.text = ""

    def push(self, token: int) -> str:
        """Append one token and return the text it completes (empty while a character is incomplete)."""
        self._ids.append(token)
        before, after = self._decode(self._window, self._read), self._decode(self._window)
        if len(after) <= len(before) or after.endswith(INCOMPLETE):
            return ""
        self._window, self._read = self._read, len(self._ids)
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
    """Text of ids, by default without special tokens."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=skip_special)
    return text


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokens that `decode` leaves out, by their texts."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token.content: number for number, token in added.items() if token.special}
