"""A lane: one prompt decoded by one method, with a clock that runs only while the lane computes.

Lanes on one machine take turns step by step, so a comparison sees the same noise on both sides.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hasten.engine import Engine, Job, Limits, Progress, SamplingParams
from hasten.llm import LLM

MEMORY_EVERY = 16
"""Steps between two looks at a drafter's memory (off the clock): adding up its tables may take a while."""


@dataclass
class Run:
    """What a lane did, in numbers. All seconds are of the lane's own clock.

    Attributes:
        tokens: that came out.
        seconds: in all.
        prompt_seconds: until the first token was out; of a canvas, until the first look at it was done.
        step_seconds: of each step after that.
        steps: forward passes that gave a token, or worked on a canvas; the first one, too.
        rows: that all steps computed, those that only read the prompt left out.
        later_rows: of them, those behind the first step.
        later_tokens: of the tokens, those behind the first step.
        accepted: draft tokens that each step behind the first took over.
        proposed: nodes that those steps drafted in all.
        draft_seconds, forward_seconds, verify_seconds: of those steps, by what they went into.
        memory_bytes: of the drafter, at its fullest.
    """

    tokens: list[int]
    seconds: float
    prompt_seconds: float
    step_seconds: list[float]
    steps: int
    rows: int
    later_rows: int
    later_tokens: int
    accepted: list[int]
    proposed: int
    draft_seconds: float
    forward_seconds: float
    verify_seconds: float
    memory_bytes: int

    @property
    def decode_seconds(self) -> float:
        """Since the first step was done."""
        return sum(self.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds if self.seconds else 0.0


class Lane:
    """One method's run over one prompt.

    Args:
        llm: the loaded model; lanes share its weights, not its engine.
        engine: the lane's own engine (reused over prompts, so that drafters are loaded once).
        method: specification.
    """

    def __init__(
        self,
        llm: LLM,
        engine: Engine,
        method: str,
        prompt: Sequence[int],
        params: SamplingParams,
        read: bool = False,
    ) -> None:
        self.method, self.engine, self.seconds = method, engine, 0.0
        self._step_seconds: list[float] = []
        self._until_first: tuple[float, float, float, float, int, int] | None = None
        self._memory_bytes = 0
        started = time.perf_counter()
        self.request: Job = engine.add(prompt, params, method, read=read)[0]
        self.seconds += time.perf_counter() - started

    @property
    def done(self) -> bool:
        return self.request.finish_reason is not None

    def step(self) -> list[Progress]:
        """One step of the lane, on its clock.

        Raises:
            whatever the request failed with.
        """
        if len(self._step_seconds) % MEMORY_EVERY == 1:
            self._look_at_memory()
        numbers = self.request.statistics
        decoding = numbers.steps > 0
        started = time.perf_counter()
        progress = self.engine.step()
        seconds = time.perf_counter() - started
        self.seconds += seconds
        if decoding:
            self._step_seconds.append(seconds)
        elif numbers.steps:
            self._until_first = (
                self.seconds, numbers.draft_seconds, numbers.forward_seconds, numbers.verify_seconds, numbers.rows,
                len(self.tokens),
            )  # fmt: skip
        if self.request.error is not None:
            raise self.request.error
        if self.done:
            self._look_at_memory()
        return progress

    def _look_at_memory(self) -> None:
        self._memory_bytes = max(self._memory_bytes, self.request.drafter.memory_bytes)

    def abort(self) -> None:
        """End the request now; harmless if it has ended."""
        self.engine.abort(self.request)

    def run(self) -> Run:
        """The figures so far."""
        numbers = self.request.statistics
        prompt, draft, forward, verify, rows, tokens = self._until_first or (self.seconds, 0.0, 0.0, 0.0, 0, 0)
        return Run(
            tokens=self.tokens,
            seconds=self.seconds,
            prompt_seconds=prompt,
            step_seconds=self._step_seconds,
            steps=numbers.steps,
            rows=numbers.rows,
            later_rows=numbers.rows - rows,
            later_tokens=len(self.tokens) - tokens,
            accepted=numbers.accepted_per_step[1:],
            proposed=numbers.proposed,
            draft_seconds=numbers.draft_seconds - draft,
            forward_seconds=numbers.forward_seconds - forward,
            verify_seconds=numbers.verify_seconds - verify,
            memory_bytes=self._memory_bytes,
        )

    @property
    def tokens(self) -> list[int]:
        return self.request.output

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds if self.seconds else 0.0


def engine_for(llm: LLM, limits: Limits | None = None) -> Engine:
    """A further engine over a loaded model: `limits`, or those of its own engine, and the limit of that one's cache."""
    own = llm.engine
    limits = limits or own.scheduler.limits
    return Engine(llm.model, llm.tokenizer, own.end_ids, limits, str(llm.folder), own.cache.limit_bytes)


def reference(engine: Engine, method: str) -> str:
    """The method of one token per pass that a specification is compared with.

    Where a model is autoregressive and fills canvases as well, that of a denoiser is another one than a drafter's.
    """
    found = engine.drafter(method)[1].reference
    return "plain" if found == "denoise" and engine.model.config.fills_canvas else found


def interleave(lanes: Sequence[Lane]) -> Iterator[tuple[Lane, list[Progress]]]:
    """Step the lane whose clock is furthest behind, until all are done."""
    while True:
        running = [lane for lane in lanes if not lane.done]
        if not running:
            return
        lane = min(running, key=lambda candidate: candidate.seconds)
        yield lane, lane.step()
