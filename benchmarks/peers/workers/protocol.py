"""What a worker is: the settings it is loaded with, the calls it answers, and the figures it gives back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Settings:
    """How a worker loads its model.

    Attributes:
        model: folder of the checkpoint, converted where the peer needs that; or a GGUF file.
        precision: `float32`, `bfloat16`, `int8`, `int4`, or `stored`: as the GGUF file has its weights.
        threads: to compute with; the process is pinned to as many processors.
        context: tokens that a sequence reaches at most, as long as several may decode together.
        longest: tokens that one alone may reach, at least as many.
        batch: sequences that decode together at most.
        draft: a smaller model of the same vocabulary, converted alike.
    """

    model: str
    precision: str
    threads: int
    context: int
    longest: int
    batch: int
    draft: str | None = None

    def room(self, prompts: list[list[int]], max_tokens: int) -> int:
        """Tokens to make room for in each sequence: one of two sizes, for whoever makes something of that size."""
        return self.context if max(map(len, prompts)) + max_tokens <= self.context else self.longest


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

    def logits(self, prompt: list[int]) -> Any:
        """What is predicted behind every token of a prompt. Not timed.

        Returns:
            An array: logits (or log-probabilities) [tokens, vocabulary] as floats, or the likeliest tokens [tokens] as
            integers. None where the peer tells neither.
        """
        return None


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._started
