"""Prepacking: prompts of different lengths share rows for prefill, and their cache is unpacked into a padded batch.

"Prepacking: A Simple Method for Fast Prefilling and Increased Throughput in Large Language Models", 2404.09529, with
its two baselines. The engine's own packing has no padding at all; see `docs/batching.md` for the comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.errors import UserError
from hasten.methods.batching.padded import PaddedCache, extend, left_padded
from hasten.model import Decoder


@dataclass(frozen=True)
class Prefilled:
    """What decoding goes on from.

    Attributes:
        caches: of one padded batch in the order of the prompts, or of several (`length_sorted`).
        logits: float32 [prompts, vocabulary] behind each prompt; None where its last token was held back.
        processed: tokens that went through the model, padding included.
    """

    caches: list[PaddedCache]
    logits: Tensor | None
    processed: int


def bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of the items in each row, by first-fit decreasing: at most 11/9 of the fewest rows, and one.

    Raises:
        UserError: an item is longer than a row.
    """
    if max(lengths, default=0) > capacity:
        raise UserError(f"a row of {capacity} tokens cannot hold a prompt of {max(lengths)}")
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        row = next((row for row, left in enumerate(room) if left >= lengths[item]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(item)
        room[row] -= lengths[item]
    return rows


def prepacked(
    model: Decoder, prompts: Sequence[Sequence[int]], capacity: int | None = None, hold_back: bool = False
) -> Prefilled:
    """One pass over packed rows.

    Args:
        prompts: at least one token each.
        capacity: tokens of a row; by default the longest prompt's.
        hold_back: leave the last token to the first decoding step, as the paper does; else first tokens come from this
            pass.

    Raises:
        UserError: an empty prompt, or one that is longer than a row.
    """
    _require_tokens(prompts)
    texts = [prompt[:-1] if hold_back else prompt for prompt in prompts]
    lengths = [len(text) for text in texts]
    packed = bins(lengths, max(lengths) if capacity is None else capacity)
    width = max(sum(lengths[item] for item in row) for row in packed)
    numbers = torch.zeros(3, len(packed), width, dtype=torch.int64)
    tokens, positions, owners = numbers
    # Padding on the right belongs to nobody: -1.
    owners.fill_(-1)
    pieces = [(0, 0, 0)] * len(texts)
    for row, items in enumerate(packed):
        start = 0
        for item in items:
            stop = start + lengths[item]
            tokens[row, start:stop] = torch.tensor(texts[item], dtype=torch.int64)
            positions[row, start:stop] = torch.arange(stop - start)
            owners[row, start:stop] = item
            pieces[item] = (row, start, stop)
            start = stop
    numbers = numbers.to(model.device)
    tokens, positions, owners = numbers
    seen = (owners.unsqueeze(2) == owners.unsqueeze(1)).tril()
    cache = PaddedCache.empty(model, len(packed))
    hidden = extend(model, cache, tokens, owners >= 0, positions, seen)
    logits = None
    if not hold_back:
        ends = torch.tensor([(row, stop - 1) for row, _, stop in pieces], device=model.device)
        logits = model.logits(hidden[ends[:, 0], ends[:, 1]], None)
    return Prefilled([cache.aligned(pieces)], logits, tokens.numel())


def padded(model: Decoder, prompts: Sequence[Sequence[int]]) -> Prefilled:
    """The usual way: all prompts as long as the longest one."""
    _require_tokens(prompts)
    tokens, content = left_padded(prompts, model)
    cache = PaddedCache.empty(model, len(prompts))
    hidden = extend(model, cache, tokens, content)
    return Prefilled([cache], model.logits(hidden[:, -1], None), tokens.numel())


def length_sorted(model: Decoder, prompts: Sequence[Sequence[int]], batches: int = 4) -> Prefilled:
    """Batches of prompts of similar lengths, padded one after the other; their caches hold prompts by length."""
    order = sorted(range(len(prompts)), key=lambda each: len(prompts[each]))
    size = -(-len(order) // batches)
    made = [padded(model, [prompts[each] for each in order[at : at + size]]) for at in range(0, len(order), size)]
    logits = torch.cat([each.logits for each in made if each.logits is not None])
    return Prefilled(
        [cache for each in made for cache in each.caches],
        logits[torch.tensor(order, device=logits.device).argsort()],
        sum(each.processed for each in made),
    )


def _require_tokens(prompts: Sequence[Sequence[int]]) -> None:
    if not prompts or not all(map(len, prompts)):
        raise UserError("prefill needs prompts of at least one token each")
