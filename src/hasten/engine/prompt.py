"""What a prompt is made of: token ids, and spans that enter as embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.errors import UserError

EMBEDDED = -1
"""Stands among a request's tokens where an embedding does."""


@dataclass(frozen=True, eq=False)
class Embedded:
    """Rows of a prompt that are no words: a soft prompt, an image's tokens, compressed chunks of text.

    Attributes:
        name: what they are, for methods that treat them apart.
        states: [rows, hidden], as the model's own embedding gives them, of any floating-point dtype.
    """

    name: str
    states: Tensor


@dataclass(frozen=True, eq=False)
class EmbeddedSpan:
    """Where a prompt has embeddings: the positions `start:stop`, with their `states` [stop - start, hidden]."""

    name: str
    start: int
    stop: int
    states: Tensor

    def within(self, start: int, stop: int) -> tuple[int, Tensor] | None:
        """What of it lies in some positions: where it begins, counted from `start`, and the states; None if nothing."""
        low, high = max(self.start, start), min(self.stop, stop)
        return None if low >= high else (low - start, self.states[low - self.start : high - self.start])


Segment = int | Embedded


def laid_out(
    prompt: Sequence[Segment], vocabulary: int, hidden: int, device: torch.device
) -> tuple[list[int], tuple[EmbeddedSpan, ...]]:
    """Token ids of a prompt, `EMBEDDED` where it has none, and its spans.

    Args:
        prompt: ids and spans, in order.
        vocabulary: ids must be below.
        hidden: width of the embeddings.

    Raises:
        UserError: nothing at all, an id outside the vocabulary, embeddings that are none of this model's.
    """
    if not prompt:
        raise UserError("the prompt is empty: give at least one token")
    tokens: list[int] = []
    spans: list[EmbeddedSpan] = []
    for segment in prompt:
        if not isinstance(segment, Embedded):
            if not 0 <= segment < vocabulary:
                raise UserError(f"token id {segment} is outside the vocabulary of {vocabulary}")
            tokens.append(segment)
            continue
        states = segment.states
        if states.dim() != 2 or not len(states) or states.shape[1] != hidden or not states.is_floating_point():
            given = f"{list(states.shape)} of {str(states.dtype).removeprefix('torch.')}"
            raise UserError(f"the embeddings of {segment.name!r} must be [rows, {hidden}] of floats, not {given}")
        if not states.isfinite().all():
            raise UserError(f"the embeddings of {segment.name!r} hold NaN or infinity")
        start = len(tokens)
        tokens += [EMBEDDED] * len(states)
        spans.append(EmbeddedSpan(segment.name, start, len(tokens), states.detach().to(device)))
    return tokens, tuple(spans)


def embedded_in(spans: Sequence[EmbeddedSpan], start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
    """The embeddings among some positions: where each run begins, counted from `start`, and its states."""
    for span in spans:
        found = span.within(start, stop)
        if found is not None:
            yield found
