"""Who runs in the next step: decoding requests first, then prompts in chunks, first come first served."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from hasten.engine.job import Job
from hasten.errors import UserError


@dataclass(frozen=True)
class Limits:
    """Bounds of one step and of the batch.

    Attributes:
        sequences: requests that run at the same time.
        rows: prompt rows of one forward pass, less those of decoding requests (one each, drafts aside). A long prompt
            is processed in chunks of what is left, at least one.
        draft_rows: drafted rows of one forward pass. What a request drafts never depends on its neighbours: those whose
            drafts do not fit have them verified in the next pass, and a larger draft is alone with prompts.

    Raises:
        UserError: a limit below 1.
    """

    sequences: int = 32
    rows: int = 1024
    draft_rows: int = 512

    def __post_init__(self) -> None:
        if min(self.sequences, self.rows, self.draft_rows) < 1:
            raise UserError("limits: sequences, rows and draft_rows must be at least 1")


class Scheduled(NamedTuple):
    """A request's share of a step: so many tokens of its prompt; 0 where the prompt is read."""

    request: Job
    piece: int


class Scheduler:
    """Queues of requests; the engine asks for a plan per step.

    Args:
        begin: called with each request that gets a place in the batch, for the first time or again.
    """

    def __init__(self, limits: Limits, begin: Callable[[Job], None] = lambda request: None) -> None:
        self.limits, self._begin = limits, begin
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []

    def add(self, request: Job) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def preempt(self, request: Job) -> None:
        """A running request makes place for older ones; it is the first to run again."""
        self.running.remove(request)
        self.waiting.appendleft(request)

    def remove(self, request: Job) -> None:
        """Forget a request wherever it is."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def followers(self, leader: Job) -> list[Job]:
        """Sibling choices that wait for a request to read the prompt, first come first."""
        return [request for request in (*self.running, *self.waiting) if request.leader is leader]

    def successors(self, forerunner: Job) -> list[Job]:
        """Requests that wait for one whose prompt begins as theirs do, first come first."""
        return [request for request in self.running if request.forerunner is forerunner]

    def plan(self) -> list[Scheduled]:
        """Requests of the next step with their rows; one whose leader or forerunner still reads the prompt waits."""
        while self.waiting and len(self.running) < self.limits.sequences:
            if not self.waiting[0].drafter.admits(self.waiting[0]):
                break
            self.running.append(self.waiting.popleft())
            self._begin(self.running[-1])
        ready = [request for request in self.running if request.leader is None and request.forerunner is None]
        backlogs = [(request, request.decoding.backlog(request)) for request in ready]
        decoding = [Scheduled(request, 0) for request, backlog in backlogs if not backlog]
        left = max(self.limits.rows - len(decoding), 1)
        prompts = []
        for request, backlog in backlogs:
            if backlog and left:
                prompts.append(Scheduled(request, min(backlog, left)))
                left -= prompts[-1].piece
        return decoding + prompts

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)
