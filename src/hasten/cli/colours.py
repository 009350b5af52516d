"""Text in the colours of how its tokens came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.engine.report import TokenKind

COLOURS: dict[TokenKind, str] = {"plain": "", "accepted": "green", "correction": "yellow"}
"""Rich's names of them; none is the terminal's own."""


class Coloured:
    """The text of a growing list of tokens, each character in the colour of the token that completed it."""

    def __init__(self, tokenizer: Any) -> None:
        from hasten.engine.text import Detokenizer

        self._detokenizer, self._colour = Detokenizer(tokenizer), COLOURS["plain"]

    def push(self, tokens: Sequence[int], kinds: Sequence[TokenKind]) -> list[tuple[str, str]]:
        """Text and colour of further tokens."""
        pieces: list[tuple[str, str]] = []
        for token, kind in zip(tokens, kinds, strict=True):
            self._colour = COLOURS[kind]
            pieces.append((self._detokenizer.push(token), self._colour))
        return [(text, colour) for text, colour in pieces if text]

    def flush(self) -> list[tuple[str, str]]:
        """What is still held back, an incomplete character."""
        rest = self._detokenizer.flush()
        return [(rest, self._colour)] if rest else []
