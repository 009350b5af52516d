"""What a worker is: the settings it is loaded with, the calls it answers, and the figures it gives back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Settings:
    """How a worker loads its model.

    Attributes:
        model: folder of the checkpoint, converted where the peer needs that.
        precision: `float32`, `bfloat16`, `int8` or `int4`.
        threads: to compute with; the process is pinned to as many processors.
        context: tokens that a sequence reaches at most.
        batch: sequences that decode together at most.
        draft: folder of a smaller model of the same vocabulary, converted alike.
    """

    model: str
    precision: str
    threads: int
    context: int
    batch: int
    draft: str | None = None


@dataclass
class Answer:
    """What one batch gave.

    Attributes:
        tokens: new ids per prompt.
        seconds: of generation, prompts included, from ids to ids.
        prefill_seconds: of these, until every prompt had its first token; None where the peer does not tell.
        overhead: share of the seconds outside the peer's own library, where the worker drives its loop; else None.
    """

    tokens: list[list[int]]
    seconds: float
    prefill_seconds: float | None = None
    overhead: float | None = None


class Worker(Protocol):
    """A loaded peer."""

    def begin(self, speculation: str | None) -> None:
        """Make ready to decode in this way, and forget what earlier prompts have taught. Not timed."""

    def run(self, prompts: list[list[int]], max_tokens: int, speculation: str | None) -> Answer:
        """Continue the prompts as one batch by exactly `max_tokens` greedy tokens, beyond end of text."""


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._started
