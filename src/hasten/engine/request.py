"""A request: one choice of one prompt, from arrival to the last token. All its state lives here, none in the batch."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from hasten.cache import Sequence
from hasten.engine.denoiser import Filling
from hasten.engine.drafter import Drafter
from hasten.engine.params import SamplingParams
from hasten.engine.sampling import Sampler
from hasten.engine.stopping import FinishReason, Stopper

TokenKind = Literal["plain", "accepted", "correction"]
"""How a token came: without a draft, from a draft, or as the target's own token at the end of a draft."""


@dataclass
class Statistics:
    """What a request cost. Rows and forwards of the prompt are counted apart from those of decoding.

    `steps` are forwards that gave tokens, or worked on a canvas; `tokens` counts them up to end of text. Seconds of a
    batch's shared forward are counted in full for each of its requests.
    """

    steps: int = 0
    tokens: int = 0
    prompt_rows: int = 0
    rows: int = 0
    proposed: int = 0
    accepted: int = 0
    accepted_per_step: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    forward_seconds: float = 0.0
    verify_seconds: float = 0.0

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps if self.steps else 0.0


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability (natural) of the chosen token, and of the likeliest ones, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Progress:
    """What one step gave one request; `finish_reason` as of that step."""

    request: Request
    tokens: list[int]
    kinds: list[TokenKind]
    text: str
    finish_reason: FinishReason | None


@dataclass(eq=False)
class Request:
    """One sequence being decoded.

    Attributes:
        id: unique within the engine.
        tokens: prompt and committed output.
        prompt_length: how many of them are the prompt.
        sequence: its cache; holds all of `tokens` but the last once the prompt is processed.
        drafter: proposes for it.
        method: the drafter's specification, for reports.
        leader: the sibling choice whose prompt cache this one forks, until it has.
        filling: the canvas, where a denoiser fills one.
        unread: what steps gave it and its sibling choices and nobody has taken yet; None where nobody reads along.
        error: what ended it, if its finish reason is `error`.
    """

    id: int
    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    choice: int
    drafter: Drafter
    method: str
    sequence: Sequence
    sampler: Sampler
    stopper: Stopper
    leader: Request | None = None
    filling: Filling | None = None
    unread: deque[Progress] | None = None
    error: Exception | None = None
    statistics: Statistics = field(default_factory=Statistics)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    kinds: list[TokenKind] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    arrived: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None
    finished_at: float | None = None

    @property
    def output(self) -> list[int]:
        """Committed new tokens."""
        return self.tokens[self.prompt_length :]

    @property
    def started(self) -> bool:
        """Whether the prompt is processed and the first token out."""
        return len(self.tokens) > self.prompt_length

    @property
    def waiting_rows(self) -> int:
        """Committed tokens that are not in the cache yet: 1 while decoding."""
        return len(self.tokens) - self.sequence.length

    @property
    def seconds(self) -> float:
        """Since arrival, until now or the end."""
        return (self.finished_at or time.perf_counter()) - self.arrived
