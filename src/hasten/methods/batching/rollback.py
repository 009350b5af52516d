"""Rollback: all rows of a batch append as many tokens as the one that accepts fewest, so nothing is ever ragged.

The baseline of batch speculation (2510.22876, section 2): right, and as slow as its slowest row.
"""

from __future__ import annotations

from collections.abc import Sequence

from hasten.methods.batching.speculation import Pair, Text, in_batches


def rollback(pair: Pair, texts: Sequence[Text], drafted: int = 5, batch: int = 4) -> None:
    """As `eqspec`; what a row accepted beyond the others is drafted and verified again."""

    def kept(news: list[list[int]]) -> list[list[int]]:
        least = min(map(len, news))
        return [new[:least] for new in news]

    in_batches(pair, texts, drafted, batch, kept)
