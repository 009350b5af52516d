"""The engine's thread, and what goes between it and the loop that serves HTTP.

Requests enter the engine by threads of a small pool, where texts become tokens and schemas are compiled, so that
nothing slow is done on the loop or between two steps. Of each step that brought news, the loop is told by one call.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from hasten.engine import Job, SamplingParams
from hasten.engine.request import Progress
from hasten.inputs import Ids
from hasten.llm import LLM
from hasten.serve.errors import ApiError

log = logging.getLogger("hasten.serve")

PREPARING = 2
"""Threads that make prompts and parameters ready; as many more for those with a constraint, which may take long."""


@dataclass(frozen=True)
class Admission:
    """What may be asked of the server at the same time; beyond it, clients are told to come again.

    Attributes:
        choices: that are decoded or wait, over all requests.
        tokens: of the prompts of these.
        seconds: until a prompt and its constraint must be ready.
    """

    choices: int = 256
    tokens: int = 2**20
    seconds: float = 10.0


class Asked(NamedTuple):
    """What a request comes to: prompts with the same parameters and method."""

    prompts: Sequence[Ids]
    params: SamplingParams
    method: str


class Ticket:
    """A request that was let in.

    Attributes:
        groups: of each prompt its choices.
    """

    def __init__(self, worker: Worker, choices: int) -> None:
        self._worker, self._choices, self._tokens = worker, choices, 0
        self.groups: list[list[Job]] = []
        self.gone = False
        self.news = asyncio.Event()

    @property
    def jobs(self) -> list[Job]:
        return [job for group in self.groups for job in group]

    async def progress(self, idle: float) -> AsyncIterator[tuple[int, Progress] | None]:
        """Which prompt, and what a step gave one of its choices, as it comes; None after `idle` seconds of nothing.

        Raises:
            whatever a choice failed with.
        """
        while True:
            self.news.clear()
            over = all(job.finished_at is not None for job in self.jobs)
            for number, group in enumerate(self.groups):
                unread = group[0].unread
                while unread:
                    step = unread.popleft()
                    if step.request.error is not None:
                        raise step.request.error
                    yield number, step
            if over:
                break
            try:
                async with asyncio.timeout(idle):
                    await self.news.wait()
            except TimeoutError:
                yield None
        if any(job.finish_reason == "abort" for job in self.jobs):
            raise ApiError(503, "the server gave up decoding", code="aborted", retry_after=1)

    def close(self) -> None:
        """Give back all that is held, whether it has ended or not."""
        if not self.gone:
            self.gone = True
            self._worker.release(self, self._choices, self._tokens)

    def charge(self, tokens: int) -> None:
        """The prompts' tokens count as long as the ticket is open."""
        self._tokens += tokens


class Worker:
    """Takes the steps of an engine on a thread of its own.

    Args:
        llm: whose engine nobody else drives.
        admission: what is let in at the same time.
    """

    def __init__(self, llm: LLM, admission: Admission) -> None:
        self.llm, self.admission = llm, admission
        self.choices = self.tokens = 0
        """That are let in now."""
        self._tickets: dict[int, Ticket] = {}
        self._wanted, self._stopped = threading.Event(), False
        self._plain = ThreadPoolExecutor(PREPARING, "prepare")
        self._constrained = ThreadPoolExecutor(PREPARING, "constrain")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Take steps from now on, and tell the running loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread, at the latest after the step it is taking."""
        self._stopped = True
        self._wanted.set()
        self._thread.join()
        for pool in (self._plain, self._constrained):
            pool.shutdown(wait=False, cancel_futures=True)

    async def submit(self, make: Callable[[], Asked], choices: int, constrained: bool) -> Ticket:
        """Let a request in.

        Args:
            make: prompts and parameters, called on a thread of the pool.
            choices: that it asks for, over all its prompts.
            constrained: whether it has a schema or a grammar to compile.

        Raises:
            ApiError: too much is asked of the server at once, or by this request alone, or this took too long.
            UserError: what is asked for cannot be.
        """
        _fits("choices", choices, self.admission.choices)
        self._admit(self.choices + choices <= self.admission.choices)
        ticket = Ticket(self, choices)
        self.choices += choices
        loop = asyncio.get_running_loop()
        pool = self._constrained if constrained else self._plain
        try:
            async with asyncio.timeout(self.admission.seconds):
                asked = await loop.run_in_executor(pool, make)
                tokens = sum(map(len, asked.prompts))
                _fits("tokens of prompts", tokens, self.admission.tokens)
                self._admit(self.tokens + tokens <= self.admission.tokens)
                self.tokens += tokens
                ticket.charge(tokens)
                await loop.run_in_executor(pool, self._add, ticket, asked)
        except TimeoutError:
            ticket.close()
            late = f"the request was not ready in {self.admission.seconds:g} s"
            if constrained:
                raise ApiError(400, f"{late}: a simpler constraint may be") from None
            raise ApiError(503, f"{late}: others are before it", code="overloaded", retry_after=1) from None
        except BaseException:
            ticket.close()
            raise
        for job in ticket.jobs:
            self._tickets[job.id] = ticket
        return ticket

    def _admit(self, fits: bool) -> None:
        if not fits:
            raise ApiError(
                429, "the server has as much to do as it takes; come again", code="overloaded", retry_after=1
            )

    def _add(self, ticket: Ticket, asked: Asked) -> None:
        """On a thread of the pool."""
        try:
            for prompt in asked.prompts:
                ticket.groups.append(self.llm.engine.add(prompt, asked.params, asked.method, read=True))
        finally:
            if ticket.gone:
                # Nobody waited for it.
                self._abort(ticket.jobs)
            self._wanted.set()

    def release(self, ticket: Ticket, choices: int, tokens: int) -> None:
        """A ticket is closed."""
        self.choices -= choices
        self.tokens -= tokens
        for job in ticket.jobs:
            self._tickets.pop(job.id, None)
        self._abort(ticket.jobs)

    def _abort(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self.llm.engine.abort(job)

    @property
    def waiting(self) -> int:
        """Choices that wait for a place in the batch."""
        return len(self.llm.engine.scheduler.waiting)

    @property
    def running(self) -> int:
        return len(self.llm.engine.scheduler.running)

    def _run(self) -> None:
        engine = self.llm.engine
        while not self._stopped:
            if not engine.busy:
                self._wanted.wait()
                self._wanted.clear()
                continue
            try:
                progress = engine.step()
                told = [step.request.id for step in progress]
            except Exception:
                # What is wrong with a request ends that one; this is wrong with the step of all.
                log.exception("a step failed: all requests in it are given up")
                jobs = [*engine.scheduler.running, *engine.scheduler.waiting]
                self._abort(jobs)
                told = [job.id for job in jobs]
            if told and self._loop is not None:
                self._loop.call_soon_threadsafe(self._tell, told)

    def _tell(self, ids: Sequence[int]) -> None:
        for number in ids:
            ticket = self._tickets.get(number)
            if ticket is not None:
                ticket.news.set()


def _fits(what: str, asked: int, limit: int) -> None:
    """Refuse what never would: to come again is no use.

    Raises:
        ApiError: so much of one request.
    """
    if asked > limit:
        raise ApiError(400, f"the request asks for {asked} {what}, and the server takes {limit} at once")
