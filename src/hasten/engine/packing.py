"""The rows of a step: all passages, one behind the other, without padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.engine.drafting.drafter import Drafter
from hasten.engine.placement import Placed
from hasten.model import Rows, Span, Taps
from hasten.model.rows import Join


def packed(placed: Sequence[Placed], hidden: int, device: torch.device) -> tuple[Rows, list[int]]:
    """All rows, and the numbers of those whose logits are wanted.

    Args:
        hidden: width of embeddings.
    """
    tokens: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    wanted: list[int] = []
    joins: list[tuple[int, int, Join]] = []
    for (request, _), passage in placed:
        start = len(tokens)
        tokens += passage.tokens
        positions += passage.positions
        wanted += [start + row for row in passage.wanted]
        joins += [(start + first, start + source, join) for first, source, join in passage.joins]
        mask = passage.mask.to(device) if isinstance(passage.mask, Tensor) else passage.mask
        spans.append(Span(request.sequence, start, len(tokens), mask))
    numbers = torch.tensor([tokens, positions], device=device)
    embeddings = None
    if any(passage.embedded for _, passage in placed):
        embeddings = torch.zeros(len(tokens), hidden, device=device)
        for span, (_, passage) in zip(spans, placed, strict=True):
            for first, states in passage.embedded:
                embeddings[span.start + first : span.start + first + len(states)] = states
    return Rows(numbers[0], numbers[1], spans, embeddings, joins=joins), wanted


def wanted_taps(placed: Sequence[Placed]) -> Taps | None:
    """Taps for all sites any drafter of this step asks for."""
    sites = {site for scheduled, _ in placed for site in scheduled.request.drafter.taps}
    sites |= {("input", job.drafter.early) for (job, piece), _ in placed if job.drafter.early and not piece}
    return Taps(sites) if sites else None


def taps_of(taps: Taps | None, drafter: Drafter, start: int, stop: int) -> Taps | None:
    """The rows `start:stop` of the sites one drafter asked for."""
    if taps is None or not drafter.taps:
        return None
    own = Taps(drafter.taps)
    own.states = {site: taps.states[site][start:stop] for site in drafter.taps}
    return own
