"""A request: one choice of one prompt, from arrival to the last token; what methods may know of it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from hasten.cache import SequenceCache
from hasten.engine.prompt import EmbeddedSpan
from hasten.engine.report import Statistics, TokenKind, TokenLogprobs
from hasten.engine.sampling.params import SamplingParams
from hasten.engine.sampling.sampler import Sampler
from hasten.engine.stopping import FinishReason, Stopper


class Progress(NamedTuple):
    """What one step gave one request; `finish_reason` as of that step."""

    request: Request
    tokens: list[int]
    kinds: list[TokenKind]
    text: str
    finish_reason: FinishReason | None


@dataclass(eq=False, kw_only=True)
class Request:
    """One sequence being decoded. All its state lives here and in `Job`, none in the batch.

    Attributes:
        id: unique within the engine.
        tokens: prompt and committed output; `EMBEDDED` where the prompt has an embedding.
        prompt_length: how many of them are the prompt.
        sequence: its cache. How many slots it has says nothing of positions: a policy may keep fewer.
        read: so many of its tokens the model has read; all but the last once the first new one is out.
        shown: so many of the prompt's the drafter has been shown: after a preemption they are only read again.
        method: the drafter's specification, for reports.
        spans: embeddings in the prompt.
        leader: the sibling choice whose prompt cache this one forks, until it has.
        unread: what steps gave it and its sibling choices and nobody has taken yet; None where nobody reads along.
        finished_at: when all that it held was given back; until then its last progress may be missing.
        prompt_logprobs: per prompt token that was read, where asked for; None where nothing predicts a token.
        error: what ended it, if its finish reason is `error`.
    """

    id: int
    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    choice: int
    method: str
    sequence: SequenceCache
    sampler: Sampler
    stopper: Stopper
    read: int = 0
    shown: int = 0
    spans: tuple[EmbeddedSpan, ...] = ()
    leader: Request | None = None
    unread: deque[Progress] | None = None
    error: Exception | None = None
    statistics: Statistics = field(default_factory=Statistics)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
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
    def seconds(self) -> float:
        """Since arrival, until now or the end."""
        return (self.finished_at or time.perf_counter()) - self.arrived
