"""Methods side by side on a suite: tokens per step, tokens per second, speed-up, accuracy, per category."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hasten.bench.lane import Lane, engine_for, interleave
from hasten.bench.suite import BenchPrompt
from hasten.engine import SamplingParams
from hasten.llm import LLM

OVERALL = "overall"


@dataclass
class _Tally:
    """Sums over the prompts of one method and category."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    draft_seconds: float = 0.0
    proposed: int = 0
    accepted: int = 0
    prompts: int = 0
    identical: int = 0
    graded: list[bool] = field(default_factory=list)
    speedups: list[float] = field(default_factory=list)

    def add(self, lane: Lane, plain: Lane, right: bool | None) -> None:
        numbers = lane.request.statistics
        self.tokens += numbers.tokens
        self.steps += numbers.steps
        self.seconds += lane.seconds
        self.draft_seconds += numbers.draft_seconds
        self.proposed += numbers.proposed
        self.accepted += numbers.accepted
        self.prompts += 1
        self.identical += lane.tokens == plain.tokens
        self.speedups.append(plain.seconds / lane.seconds)
        if right is not None:
            self.graded.append(right)


def compare(
    llm: LLM,
    methods: Sequence[str],
    prompts: Sequence[BenchPrompt],
    params: SamplingParams,
    rounds: int = 1,
    report: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """One row per method and category, plus `overall`.

    All methods decode each prompt in turns (step by step, on their own clocks) beside plain decoding.
    `tokens_per_second` is total tokens over total seconds; `speedup` is the median over prompts of plain seconds over
    the method's seconds.

    Raises:
        UserError: unknown method, a prompt that is too long.
    """
    names = ["plain", *(method for method in methods if method != "plain")]
    engines = {name: engine_for(llm) for name in names}
    for engine, name in zip(engines.values(), names, strict=True):
        engine.drafter(name)
    tallies: dict[tuple[str, str], _Tally] = {}
    warm = llm.encode(prompts[0].prompt)
    for number in range(-1, rounds):
        for prompt in prompts[: 1 if number < 0 else None]:
            ids = warm if number < 0 else llm.encode(prompt.prompt)
            lanes = {name: Lane(llm, engines[name], name, ids, params) for name in names}
            for _ in interleave(list(lanes.values())):
                pass
            if number < 0:
                continue
            for name, lane in lanes.items():
                right = None
                if prompt.grade is not None:
                    right = prompt.grade(llm.tokenizer.decode(lane.tokens, skip_special_tokens=True))
                for category in (prompt.category, OVERALL):
                    tallies.setdefault((name, category), _Tally()).add(lane, lanes["plain"], right)
            report(1)
    order = sorted(tallies, key=lambda key: (names.index(key[0]), key[1] == OVERALL, key[1]))
    return [_row(name, category, tallies[name, category]) for name, category in order]


def _row(name: str, category: str, tally: _Tally) -> dict[str, Any]:
    return {
        "method": name,
        "category": category,
        "prompts": tally.prompts,
        "tokens_per_step": round(tally.tokens / tally.steps, 4),
        "tokens_per_second": round(tally.tokens / tally.seconds, 2),
        "speedup": round(statistics.median(tally.speedups), 4),
        "accuracy": round(sum(tally.graded) / len(tally.graded), 4) if tally.graded else None,
        "acceptance": round(tally.accepted / tally.proposed, 4) if tally.proposed else None,
        "draft_share": round(tally.draft_seconds / tally.seconds, 4),
        "identical": tally.identical,
    }
