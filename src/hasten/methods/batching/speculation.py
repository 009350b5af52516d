"""A round of speculation for a padded batch: what EQSPEC, EXSPEC and rollback have in common (2510.22876)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hasten.engine.sampling.noise import gumbel_array, mix
from hasten.errors import UserError
from hasten.methods.batching.padded import PaddedCache, extend, left_padded
from hasten.model import Decoder


@dataclass
class Text:
    """A request: its tokens so far, and where it ends.

    Attributes:
        limit: tokens of the prompt and the answer together, at most.
        temperature, seed: of its own random numbers; 0 is greedy.
    """

    tokens: list[int]
    limit: int
    temperature: float = 0.0
    seed: int = 0
    done: bool = False


@dataclass
class Counters:
    """Of a run. `moved` counts rounds after which rows of the caches had to move, `grouped` those without padding."""

    rounds: int = 0
    appended: int = 0
    moved: int = 0
    grouped: int = 0


@dataclass
class Pair:
    """A target and its drafter, of one vocabulary, and what ends a text.

    Raises:
        UserError: their vocabularies differ.
    """

    target: Decoder
    drafter: Decoder
    ends: frozenset[int] = frozenset()
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        if self.target.config.vocab_size != self.drafter.config.vocab_size:
            raise UserError("batch speculation needs a drafter with the target's vocabulary")


def chosen(text: Text, logits: Tensor, position: int) -> int:
    """The token at a position of a text, given float32 logits [vocabulary].

    Where it samples, Gumbel noise of its own seed and the position decides, so it does not depend on the batch or on
    what was drafted: a draft is accepted where it is what the target draws.
    """
    if text.temperature == 0:
        return int(logits.argmax())
    noise = gumbel_array(mix(position, state=mix(text.seed)), np.arange(len(logits)))
    return int(np.argmax(logits.cpu().numpy() / text.temperature + noise))


class Batch:
    """Texts that are decoded together: row i has `length - len(tokens)` slots of padding on the left.

    Between rounds both caches hold `length - 1` slots: the newest token of each row, in the last column, is unread.
    """

    def __init__(
        self, pair: Pair, texts: Sequence[Text], caches: tuple[PaddedCache, PaddedCache] | None = None
    ) -> None:
        self.pair, self.texts = pair, list(texts)
        self.target, self.drafter = caches or (prefill(pair.target, texts), prefill(pair.drafter, texts))

    @property
    def length(self) -> int:
        return max(len(text.tokens) for text in self.texts)

    def padding(self) -> list[int]:
        return [self.length - len(text.tokens) for text in self.texts]

    def round(self, drafted: int) -> list[list[int]]:
        """Draft so many tokens, or as many as the longest budget has room for, and verify: what each row may append.

        The last of a row's tokens is always the target's, also where all of the draft is right.
        """
        most = max(text.limit - len(text.tokens) for text in self.texts)
        draft = self._draft(min(drafted, most - 1))
        said = self._verify(draft)
        return [accepted(row, choices) for row, choices in zip(draft, said, strict=True)]

    def append(self, news: Sequence[Sequence[int]]) -> None:
        """Give each row its tokens, cut at the end of the text; rows that are done leave, the others are aligned again.

        With L the new length, row i moves by L - (old length) - (its tokens) slots.
        """
        before, padding, counters = self.length, self.padding(), self.pair.counters
        for text, new in zip(self.texts, news, strict=True):
            self._extend(text, new)
        counters.rounds += 1
        going = [row for row, text in enumerate(self.texts) if not text.done]
        pieces = [(row, padding[row], padding[row] + len(self.texts[row].tokens) - 1) for row in going]
        self.texts = [self.texts[row] for row in going]
        if not going:
            return
        shifts = {
            self.length - before - (len(text.tokens) - (before - padding[row]))
            for row, text in zip(going, self.texts, strict=True)
        }
        counters.moved += shifts != {0}
        self.target, self.drafter = self.target.aligned(pieces), self.drafter.aligned(pieces)

    def _extend(self, text: Text, new: Sequence[int]) -> None:
        for token in new:
            text.tokens.append(token)
            self.pair.counters.appended += 1
            if token in self.pair.ends or len(text.tokens) >= text.limit:
                text.done = True
                return

    def _draft(self, count: int) -> list[list[int]]:
        """So many tokens per row. The last one is read as well, so that both caches hold the same slots."""
        draft: list[list[int]] = [[] for _ in self.texts]
        newest = [text.tokens[-1] for text in self.texts]
        for number in range(count + 1):
            logits = self._read(self.pair.drafter, self.drafter, [[token] for token in newest])[:, 0]
            if number < count:
                newest = [
                    chosen(text, row, len(text.tokens) + number) for text, row in zip(self.texts, logits, strict=True)
                ]
                for row, token in zip(draft, newest, strict=True):
                    row.append(token)
        return draft

    def _verify(self, draft: Sequence[Sequence[int]]) -> list[list[int]]:
        """The target's own tokens behind the newest one and behind each drafted one."""
        columns = [[text.tokens[-1], *row] for text, row in zip(self.texts, draft, strict=True)]
        logits = self._read(self.pair.target, self.target, columns)
        return [
            [chosen(text, each, len(text.tokens) + number) for number, each in enumerate(row)]
            for text, row in zip(self.texts, logits, strict=True)
        ]

    def _read(self, model: Decoder, cache: PaddedCache, columns: list[list[int]]) -> Tensor:
        """Logits [rows, columns, vocabulary]."""
        tokens = torch.tensor(columns, device=model.device)
        hidden = extend(model, cache, tokens, torch.ones_like(tokens, dtype=torch.bool))
        return model.logits(hidden.flatten(0, 1), None).view(*tokens.shape, -1)


def in_batches(
    pair: Pair,
    texts: Sequence[Text],
    drafted: int,
    batch: int,
    kept: Callable[[list[list[int]]], list[list[int]]] = lambda news: news,
) -> None:
    """Decode so many texts at a time, one batch after the other.

    Args:
        kept: of what the rows of a round may append, what they do.
    """
    for start in range(0, len(texts), batch):
        rows = [text for text in texts[start : start + batch] if not text.done]
        if not rows:
            continue
        together = Batch(pair, rows)
        while together.texts:
            together.append(kept(together.round(drafted)))


def prefill(model: Decoder, texts: Sequence[Text]) -> PaddedCache:
    """Of all tokens but the newest ones."""
    cache = PaddedCache.empty(model, len(texts))
    tokens, content = left_padded([text.tokens[:-1] for text in texts], model)
    if tokens.numel():
        extend(model, cache, tokens, content)
    return cache


def accepted(draft: Sequence[int], choices: Sequence[int]) -> list[int]:
    """Drafted tokens as far as the target chose the same, and its own token behind them."""
    right = next((at for at, token in enumerate(draft) if token != choices[at]), len(draft))
    return [*draft[:right], choices[right]]
