"""What a request may not choose at some place of its output: ends that come too soon, words that it must not say."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.errors import UserError

Word = tuple[int, ...]
"""A word as one of its spellings in tokens."""


def spelled(tokenizer: Any, words: Iterable[str | Word], vocabulary: int) -> frozenset[Word]:
    """The spellings of words that must not be said: as they begin a text, and behind a blank. Ids are their own.

    Raises:
        UserError: text without a tokenizer, a word without tokens, ids outside the vocabulary.
    """
    spellings: set[Word] = set()
    for word in words:
        if not isinstance(word, str):
            spellings.add(word)
        elif tokenizer is None:
            raise UserError("bad_words need a tokenizer, and this model has none: give token ids")
        else:
            for text in (word, " " + word.lstrip()):
                spellings.add(tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))
    if () in spellings:
        raise UserError("bad_words holds a word that has no tokens")
    outside = next((token for word in spellings for token in word if not 0 <= token < vocabulary), None)
    if outside is not None:
        raise UserError(f"bad_words: token id {outside} is outside the vocabulary of {vocabulary}")
    return frozenset(spellings)


class Bans:
    """The tokens that one choice may not take next, behind any path of uncommitted tokens.

    Args:
        endings: tokens that end the text.
        minimum: so many tokens come before any of them.
        words: of each, the last token is banned behind the others in the output.
    """

    def __init__(self, endings: Collection[int], minimum: int, words: Collection[Word]) -> None:
        self._endings = sorted(endings)
        self._minimum = minimum if endings else 0
        self._words: dict[Word, set[int]] = {}
        for *before, last in words:
            self._words.setdefault(tuple(before), set()).add(last)
        self._lengths = sorted({len(before) for before in self._words})
        self._count, self._tail = 0, Word()

    @property
    def any(self) -> bool:
        """Whether something may be banned from here on."""
        return bool(self._words) or self._count < self._minimum

    def committed(self, tokens: Sequence[int]) -> None:
        """New output tokens."""
        self._count += len(tokens)
        if self._words:
            # Of the output, as much as the longest word can begin with.
            recent = (*self._tail, *tokens)
            self._tail = recent[max(0, len(recent) - self._lengths[-1]) :]

    def behind(self, path: Sequence[int]) -> list[int]:
        """The tokens that are banned behind these uncommitted ones."""
        banned = list(self._endings) if self._count + len(path) < self._minimum else []
        recent = (*self._tail, *path)
        for length in self._lengths:
            if length <= len(recent):
                banned += self._words.get(recent[len(recent) - length :], ())
        return banned

    def applied(self, logits: Tensor, paths: Sequence[Sequence[int]]) -> Tensor:
        """Logits [rows, vocabulary] without the tokens that are banned behind each row's path."""
        banned = [(row, token) for row, path in enumerate(paths) for token in self.behind(path)]
        if not banned:
            return logits
        rows, tokens = torch.tensor(banned, device=logits.device).unbind(1)
        return logits.index_put((rows, tokens), torch.tensor(-torch.inf, device=logits.device))
