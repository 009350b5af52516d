"""A lane: one prompt decoded by one method, with a clock that runs only while the lane computes.

Lanes on one machine take turns step by step, so a comparison sees the same noise on both sides.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from hasten.engine import Engine, Progress, Request, SamplingParams
from hasten.llm import LLM


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
        started = time.perf_counter()
        self.request: Request = engine.add(prompt, params, method, read=read)[0]
        self.seconds += time.perf_counter() - started

    @property
    def done(self) -> bool:
        return self.request.finish_reason is not None

    def step(self) -> list[Progress]:
        """One step of the lane, on its clock."""
        started = time.perf_counter()
        progress = self.engine.step()
        self.seconds += time.perf_counter() - started
        return progress

    @property
    def tokens(self) -> list[int]:
        return self.request.output

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds if self.seconds else 0.0


def engine_for(llm: LLM) -> Engine:
    """A further engine over a loaded model."""
    return Engine(llm.model, llm.tokenizer, llm.engine.end_ids, llm.engine.scheduler.limits, str(llm.folder))


def interleave(lanes: Sequence[Lane]) -> Iterator[tuple[Lane, list[Progress]]]:
    """Step the lane whose clock is furthest behind, until all are done."""
    while True:
        running = [lane for lane in lanes if not lane.done]
        if not running:
            return
        lane = min(running, key=lambda candidate: candidate.seconds)
        yield lane, lane.step()
