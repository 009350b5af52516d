"""Drafters look into a pass while it is under way (`Drafter.early`, `Drafter.glimpse`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from hasten.engine.drafting.speculation import Speculation
from hasten.engine.job import Job
from hasten.engine.placement import Placed
from hasten.model import Span, Taps

Verified = tuple[Job, Span]
"""A request whose draft a pass verifies, and its rows."""


class Glimpses:
    """Those of one pass.

    Args:
        placed: who takes part, and with which rows.
        spans: these rows.
        taps: of the pass; are made to tell who wants to look.

    Attributes:
        failed: requests whose drafter failed as it looked. The pass is all requests', so they end behind it.
    """

    def __init__(self, placed: Sequence[Placed], spans: Sequence[Span], taps: Taps | None) -> None:
        self.failed: list[tuple[Job, Exception]] = []
        self._layers: dict[int, dict[int, list[Verified]]] = {}
        for ((job, piece), _), span in zip(placed, spans, strict=True):
            if job.drafter.early and not piece and isinstance(job.decoding, Speculation):
                drafters = self._layers.setdefault(job.drafter.early, {})
                drafters.setdefault(id(job.drafter), []).append((job, span))
        if taps is not None:
            taps.listeners |= {("input", layer): partial(self._tell, layer) for layer in self._layers}

    def _tell(self, layer: int, states: Tensor) -> None:
        for verified in self._layers[layer].values():
            jobs = [job for job, _ in verified]
            drafts = [job.decoding.draft for job in jobs if isinstance(job.decoding, Speculation)]
            starts = [span.start for _, span in verified]
            rows = [states[start : start + 1 + len(draft)] for start, draft in zip(starts, drafts, strict=True)]
            try:
                jobs[0].drafter.glimpse(jobs, drafts, rows)
            except Exception as error:
                self.failed += [(job, error) for job in jobs]
