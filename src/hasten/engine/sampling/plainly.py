"""The choice of one row in NumPy: what `sample.cpp` does, where it was not built, and what it is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hasten.engine.sampling.noise import gumbel_array, mix
from hasten.engine.sampling.rule import Rule


def choice(
    rule: Rule, logits: NDArray[np.float32], position: int, path: Sequence[int], allowed: NDArray[np.uint8] | None
) -> int:
    """The likeliest token, or the draw of the position; the first one where none is possible.

    Args:
        logits: float32 [vocabulary].
        path: uncommitted tokens above the row.
        allowed: tokens that a grammar allows, one bit each, lowest bit first.
    """
    logits = _adjusted(rule, logits, path, allowed)
    if not logits.max() > -np.inf:
        return 0
    if rule.temperature == 0:
        return int(logits.argmax())
    if rule.temperature < rule.tame:
        logits = logits - logits.max()
    scores, tokens = logits / rule.temperature, np.arange(len(logits))
    if rule.filters:
        # Of equal ones the first.
        tokens = np.argsort(-scores, kind="stable")[: rule.top_k or None]
        scores = scores[tokens]
    if rule.top_p < 1:
        mass = np.exp(scores - scores[0]).astype(np.float64)
        scores[1:][mass.cumsum()[:-1] >= rule.top_p * mass.sum()] = -np.inf
    scores[scores < scores.max() + rule.log_min_p] = -np.inf
    noise = gumbel_array(mix(position, state=rule.stream), tokens)
    return int(tokens[(scores + noise).argmax()])


def _adjusted(
    rule: Rule, logits: NDArray[np.float32], path: Sequence[int], allowed: NDArray[np.uint8] | None
) -> NDArray[np.float32]:
    """Logits with bias, penalties and grammar."""
    logits = logits.copy()
    logits[rule.bias_tokens] += rule.bias_values
    if rule.seen is not None and rule.counts is not None:
        seen, counts = rule.seen.copy(), rule.counts.copy()
        seen[list(path)] = True
        np.add.at(counts, list(path), 1)
        penalised = np.where(logits > 0, logits / rule.repetition, logits * rule.repetition)
        logits = np.where(seen, penalised, logits) - rule.presence * (counts > 0) - rule.frequency * counts
    if allowed is not None:
        logits[~np.unpackbits(allowed, count=len(logits), bitorder="little").view(np.bool_)] = -np.inf
    return logits
