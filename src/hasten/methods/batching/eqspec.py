"""EQSPEC: batch speculation that is right, as rows are aligned again after every round (2510.22876, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

from hasten.methods.batching.speculation import Pair, Text, in_batches


def eqspec(pair: Pair, texts: Sequence[Text], drafted: int = 5, batch: int = 4) -> None:
    """Decode texts in batches of so many, with so many drafted tokens per round. Greedy: as plain decoding."""
    in_batches(pair, texts, drafted, batch)
