"""A checkpoint's tokenizer as llguidance needs it: text is text, whatever it spells."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLTokenizer


def text_tokenizer(tokenizer: Any, size: int, ends: Collection[int]) -> LLTokenizer:
    """llguidance's view of a tokenizer.

    Args:
        tokenizer: of transformers, backed by the tokenizers library.
        size: tokens, with what pads the vocabulary.
        ends: end-of-text ids; without any, the tokenizer's own.

    Raises:
        ImportError: llguidance is not installed.
        Exception: it cannot read the tokenizer.
    """
    from llguidance import LLTokenizer, TokenizerWrapper
    from llguidance.hf import from_tokenizer

    eos = list(ends) or None
    whole = from_tokenizer(tokenizer, n_vocab=size, eos_token=eos, slices=[])
    return LLTokenizer(TokenizerWrapper(_Text(whole)), n_vocab=size, eos_token=eos or list(whole.eos_tokens))


class _Text:
    """What `TokenizerWrapper` asks for. Text that spells a special token is cut otherwise: the longest text first."""

    def __init__(self, whole: LLTokenizer) -> None:
        self._whole = whole
        ids = range(whole.vocab_size)
        self.tokens = [whole.decode_bytes([token]) for token in ids]
        self.special_token_ids = [token for token in ids if whole.is_special_token(token)]
        self._special = frozenset(self.special_token_ids)
        self.eos_token_id, self.bos_token_id = whole.eos_token, None

    def __call__(self, text: bytes) -> list[int]:
        tokens = self._whole.tokenize_bytes(text)
        return tokens if self._special.isdisjoint(tokens) else self._whole.greedy_tokenize(text.decode())
