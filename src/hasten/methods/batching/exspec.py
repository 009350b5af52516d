"""EXSPEC: texts wait in a pool, and those of equal length run together, so no row has to move (2510.22876, 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.methods.batching.padded import PaddedCache
from hasten.methods.batching.prepacking import prepacked
from hasten.methods.batching.speculation import Batch, Pair, Text


@dataclass
class Pooled:
    """A text with its own caches, of all tokens but the newest, without padding; and how often it was passed over."""

    text: Text
    target: PaddedCache
    drafter: PaddedCache
    waited: int = 0


def exspec(
    pair: Pair, texts: Sequence[Text], drafted: int = 5, batch: int = 4, window: int = 32, patience: int = 16
) -> None:
    """Decode texts in batches of so many.

    Args:
        window: texts that are looked at to find equal lengths.
        patience: rounds after which a text that was passed over goes first, whatever the lengths: a common length must
            not hold up the others for ever. This is not in the paper.
    """
    waiting = [text for text in texts if not text.done]
    pool: list[Pooled] = []
    while waiting or pool:
        room = window - len(pool)
        pool += _admitted(pair, waiting[:room])
        waiting = waiting[room:]
        group = chosen_group(pool, batch, patience)
        pair.counters.grouped += len({len(each.text.tokens) for each in group}) == 1
        together = Batch(
            pair,
            [each.text for each in group],
            (PaddedCache.joined([each.target for each in group]), PaddedCache.joined([each.drafter for each in group])),
        )
        together.append(together.round(drafted))
        going = [each for each in group if not each.text.done]
        if going:
            for each, target, drafter in zip(going, together.target.rows(), together.drafter.rows(), strict=True):
                each.target, each.drafter = target, drafter
        for each in pool:
            each.waited = 0 if any(each is other for other in group) else each.waited + 1
        pool = [each for each in pool if not each.text.done]


def chosen_group(pool: Sequence[Pooled], batch: int, patience: int) -> list[Pooled]:
    """The first so many texts of one length; where no length has so many, or one waited too long, the first of all."""
    if all(each.waited < patience for each in pool):
        buckets: dict[int, list[Pooled]] = {}
        for each in pool:
            bucket = buckets.setdefault(len(each.text.tokens), [])
            bucket.append(each)
            if len(bucket) == batch:
                return bucket
    return sorted(pool, key=lambda each: -each.waited)[:batch]


def _admitted(pair: Pair, texts: Sequence[Text]) -> list[Pooled]:
    """New texts are read together, so that every text of the pool has its caches."""
    if not texts:
        return []
    prompts = [text.tokens for text in texts]
    target, drafter = (prepacked(model, prompts, hold_back=True).caches[0] for model in (pair.target, pair.drafter))
    return [Pooled(*each) for each in zip(texts, target.rows(), drafter.rows(), strict=True)]
