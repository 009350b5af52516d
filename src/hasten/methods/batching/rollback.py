"""Rollback: all rows of a batch append as many tokens as the one that accepts fewest, so nothing is ever ragged.

The baseline of batch speculation (2510.22876, section 2): right, and as slow as its slowest row.
"""

from __future__ import annotations

from collections.abc import Sequence

from hasten.methods.batching.speculation import Batch, Pair, Text


def rollback(pair: Pair, texts: Sequence[Text], drafted: int = 5, batch: int = 4) -> None:
    """As `eqspec`; what a row accepted beyond the others is drafted and verified again."""
    for start in range(0, len(texts), batch):
        rows = [text for text in texts[start : start + batch] if not text.done]
        if not rows:
            continue
        together = Batch(pair, rows)
        while together.texts:
            news = together.round(drafted)
            least = min(map(len, news))
            together.append([new[:least] for new in news])
