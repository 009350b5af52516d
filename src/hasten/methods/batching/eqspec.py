"""EQSPEC: batch speculation that is right, as rows are aligned again after every round (2510.22876, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

from hasten.methods.batching.speculation import Batch, Pair, Text


def eqspec(pair: Pair, texts: Sequence[Text], drafted: int = 5, batch: int = 4) -> None:
    """Decode texts in batches of so many, with so many drafted tokens per round. Greedy: as plain decoding."""
    for start in range(0, len(texts), batch):
        rows = [text for text in texts[start : start + batch] if not text.done]
        if not rows:
            continue
        together = Batch(pair, rows)
        while together.texts:
            together.append(together.round(drafted))
