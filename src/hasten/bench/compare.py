"""Methods side by side on a suite: tokens per step, speed-up, accuracy, where the time goes, per category."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hasten.bench.conversation import Reader
from hasten.bench.doctor import machine
from hasten.bench.lane import Lane, Run, engine_for, interleave
from hasten.bench.prediction import predicted_speedup
from hasten.bench.prompts import BenchPrompt
from hasten.engine import Engine, SamplingParams
from hasten.engine.drafting.cost import VerifyCost, measure
from hasten.errors import UserError
from hasten.llm import LLM

OVERALL = "overall"
WARM_UP = "Warm up: one two three four"
"""A text of no suite: first passes are slow, and drafters must not have seen what they are timed on."""


@dataclass(frozen=True)
class _Pair:
    """A method's run over a prompt, and plain decoding's of the same turns.

    Attributes:
        question: number of the conversation that it is a turn of, or of the prompt that stands alone.
        sample: which of the answers to it.
        round: in which all methods decoded it beside each other.
    """

    run: Run
    plain: Run
    right: float | None
    question: int
    sample: int
    round: int

    @property
    def speedup(self) -> float:
        return self.plain.seconds / self.run.seconds

    @property
    def decodes(self) -> bool:
        """Whether there was anything to decode behind the first step."""
        return bool(self.run.step_seconds and self.plain.step_seconds)

    @property
    def positions(self) -> int:
        """Tokens of the longer one of the two outputs."""
        return max(len(self.run.tokens), len(self.plain.tokens))

    @property
    def agreeing(self) -> int:
        """Positions at which both have the same token."""
        return sum(a == b for a, b in zip(self.run.tokens, self.plain.tokens, strict=False))


def bench(
    llm: LLM,
    methods: Sequence[str],
    prompts: Sequence[BenchPrompt],
    params: Sequence[SamplingParams],
    rounds: int = 1,
    report: Callable[[int], None] = lambda done: None,
    samples: int = 1,
) -> dict[str, Any]:
    """The JSON document of `hasten bench`, but for what the command line adds.

    Args:
        params: the suite is decoded with each of these, one after the other; they differ in temperature.

    Raises:
        UserError: unknown method, a prompt that is too long.
    """
    curve = cost = None
    diffusion = llm.model.config.diffusion
    if diffusion is None or diffusion.attention != "full":
        # A pass over a whole canvas has no rows behind a cached context to count the cost of.
        curve = measure(llm.model)
        cost = {str(count): round(curve.ratio(count), 4) for count in curve.rows}
    rows = [
        row | {"temperature": each.temperature}
        for each in params
        for row in compare(llm, methods, prompts, each, rounds, report, curve, samples)
    ]
    return {"machine": machine(llm), "verify_cost": cost, "rows": rows}


def compare(
    llm: LLM,
    methods: Sequence[str],
    prompts: Sequence[BenchPrompt],
    params: SamplingParams,
    rounds: int = 1,
    report: Callable[[int], None] = lambda done: None,
    curve: VerifyCost | None = None,
    samples: int = 1,
) -> list[dict[str, Any]]:
    """One row per method and category, plus `overall`.

    All methods decode each prompt in turns (step by step, on their own clocks) beside plain decoding, and each goes on
    with its own conversations. A drafter keeps what it learns from prompt to prompt, and starts anew with every round:
    the answers of the round before would give this one's away.

    Args:
        params: without `max_tokens`, each prompt's own holds.
        curve: what rows cost; without it no speed-up is predicted.
        samples: of each prompt, one after the other, with seeds of their own.

    Raises:
        UserError: unknown method, a prompt that is too long, several samples of a greedy answer.
    """
    if samples > 1 and params.greedy:
        raise UserError("several samples of a prompt need a temperature above 0: greedy ones are all the same")
    names = ["plain", *(method for method in methods if method != "plain")]
    questions = list(itertools.accumulate(int(prompt.opens) for prompt in prompts))
    pairs: dict[tuple[str, str], list[_Pair]] = {}
    for place in range(rounds):
        engines = warm_engines(llm, names)
        if place == 0:
            _refuse(engines["plain"], Reader(llm, params), prompts)
        readers = [{name: Reader(llm, params) for name in names} for _ in range(samples)]
        for (number, prompt), sample in itertools.product(enumerate(prompts), range(samples)):
            # Shared noise would make answers to different prompts alike, and drafters that remember look good.
            seed = (params.seed or 0) + samples * number + sample
            runs = _decode(llm, engines, readers[sample], prompt, replace(prompt.within(params), seed=seed))
            for name, run in runs.items():
                right = None
                if prompt.grade is not None:
                    right = prompt.grade(llm.tokenizer.decode(run.tokens, skip_special_tokens=True))
                pair = _Pair(run, runs["plain"], right, questions[number], sample, place)
                for category in (prompt.category, OVERALL):
                    pairs.setdefault((name, category), []).append(pair)
            if sample == samples - 1:
                report(1)
    order = sorted(pairs, key=lambda key: (names.index(key[0]), key[1] == OVERALL, key[1]))
    return [{"method": name, "category": category} | _figures(pairs[name, category], curve) for name, category in order]


def warm_engines(llm: LLM, methods: Sequence[str]) -> dict[str, Engine]:
    """An engine per method, its drafter loaded, and each used once.

    Raises:
        UserError: a method that is unknown or lacks something.
    """
    engines = {method: engine_for(llm) for method in methods}
    for method, engine in engines.items():
        engine.drafter(method)
        engine.add(llm.encode(WARM_UP), SamplingParams(max_tokens=8, ignore_eos=True), method)
        for _ in engine.run():
            pass
    return engines


def _refuse(engine: Engine, reader: Reader, prompts: Sequence[BenchPrompt]) -> None:
    """Find what cannot be decoded before anything is measured: an hour later it would cost all figures.

    Raises:
        UserError: a prompt, or a conversation's first turn, that does not fit.
    """
    for prompt in prompts:
        if prompt.opens:
            for request in engine.add(reader.ids(prompt), prompt.within(reader.params)):
                engine.abort(request)


def _decode(
    llm: LLM,
    engines: Mapping[str, Engine],
    readers: Mapping[str, Reader],
    prompt: BenchPrompt,
    params: SamplingParams,
) -> dict[str, Run]:
    """One prompt by all methods, in turns, each as its own reader has it."""
    lanes = [Lane(llm, engine, method, readers[method].ids(prompt), params) for method, engine in engines.items()]
    for _ in interleave(lanes):
        pass
    for lane in lanes:
        readers[lane.method].answered(prompt, lane.tokens)
    return {lane.method: lane.run() for lane in lanes}


def _figures(pairs: Sequence[_Pair], curve: VerifyCost | None) -> dict[str, Any]:
    """What a row says of one method and category. Its keys are explained in docs/benchmarks.md."""
    runs = [pair.run for pair in pairs]
    tokens = sum(len(run.tokens) for run in runs)
    seconds = sum(run.seconds for run in runs)
    decoded = [pair for pair in pairs if pair.decodes]
    steps = sum(len(run.step_seconds) for run in runs)
    accepted = Counter(count for run in runs for count in run.accepted)
    proposed = sum(run.proposed for run in runs)
    graded = [pair.right for pair in pairs if pair.right is not None]
    plain_step, plain_forward, plain_rows = _plain_step([pair.plain for pair in pairs])
    predicted: list[float] = []
    if curve is not None:
        predicted = [_predicted(pair, curve, plain_step, plain_forward, plain_rows) for pair in decoded]
    split = {
        "prompt": sum(run.prompt_seconds for run in runs),
        "draft": sum(run.draft_seconds for run in runs),
        "forward": sum(run.forward_seconds for run in runs),
        "verify": sum(run.verify_seconds for run in runs),
    }
    split["other"] = max(seconds - sum(split.values()), 0.0)
    draft_step = split["draft"] / steps if steps else 0.0
    return {
        "prompts": len(pairs),
        "questions": len({(pair.question, pair.sample, pair.round) for pair in pairs}),
        "tokens_per_step": _tokens_per_step(runs),
        "mean_accepted_tokens": round(sum(run.later_tokens for run in runs) / steps, 4) if steps else None,
        "rows_per_token": round(sum(run.rows for run in runs) / tokens, 4) if tokens else None,
        "tokens_per_second": round(tokens / seconds, 2),
        "speedup": round(statistics.median(pair.speedup for pair in pairs), 4),
        "speedup_of_rates": round(_speedup_of_rates(pairs), 4),
        "decode_speedup": _median([pair.plain.decode_seconds / pair.run.decode_seconds for pair in decoded]),
        "predicted_speedup": _median(predicted),
        "accuracy": round(sum(graded) / len(graded), 4) if graded else None,
        "acceptance": round(_sum(accepted) / proposed, 4) if proposed else None,
        "accepted_per_step": round(_sum(accepted) / steps, 4) if steps else None,
        "accepted_histogram": [accepted[count] for count in range(max(accepted, default=-1) + 1)],
        "acceptance_by_depth": _by_depth(accepted),
        "proposed_per_step": round(proposed / steps, 4) if steps else None,
        "draft_us_per_step": round(draft_step * 1e6, 2),
        "draft_overhead": round(draft_step / plain_step, 4) if plain_step else None,
        "draft_share": round(split["draft"] / seconds, 4),
        "time_split": {part: round(value, 6) for part, value in split.items()},
        "memory_bytes": max(run.memory_bytes for run in runs),
        "tokens_per_step_by_sample": _by_sample(pairs),
        "identical": sum(pair.run.tokens == pair.plain.tokens for pair in pairs),
        "agreement": round(sum(pair.agreeing for pair in pairs) / max(sum(pair.positions for pair in pairs), 1), 4),
    }


def _by_depth(accepted: Counter[int]) -> list[float]:
    """Of the steps that accepted all of a path's first tokens, the share that accepted one more, for each depth."""
    reached = [
        sum(times for count, times in accepted.items() if count >= depth)
        for depth in range(max(accepted, default=0) + 1)
    ]
    return [round(more / of, 4) for of, more in itertools.pairwise(reached)]


def _speedup_of_rates(pairs: Sequence[_Pair]) -> float:
    """Spec-Bench's speed-up, a median over rounds: within each, the mean rate over questions, over plain decoding's."""
    rounds: dict[int, dict[tuple[int, int], list[_Pair]]] = {}
    for pair in pairs:
        rounds.setdefault(pair.round, {}).setdefault((pair.question, pair.sample), []).append(pair)
    return statistics.median(
        statistics.mean(_rate([pair.run for pair in turns]) for turns in questions.values())
        / statistics.mean(_rate([pair.plain for pair in turns]) for turns in questions.values())
        for questions in rounds.values()
    )


def _rate(runs: Sequence[Run]) -> float:
    """Tokens per second of all turns of a question."""
    return sum(len(run.tokens) for run in runs) / sum(run.seconds for run in runs)


def _by_sample(pairs: Sequence[_Pair]) -> list[float]:
    """Tokens per step of the first answer to each prompt, of the second, and so on."""
    result = []
    for sample in range(max(pair.sample for pair in pairs) + 1):
        result.append(_tokens_per_step([pair.run for pair in pairs if pair.sample == sample]))
    return result


def _tokens_per_step(runs: Sequence[Run]) -> float:
    return round(sum(len(run.tokens) for run in runs) / sum(run.steps for run in runs), 4)


def _plain_step(runs: Sequence[Run]) -> tuple[float, float, float]:
    """Median seconds of a step of plain decoding, its forward pass's part of them, its rows; 0 if there was none."""
    steps = [step for run in runs for step in run.step_seconds]
    if not steps:
        return 0.0, 0.0, 0.0
    median = statistics.median(steps)
    rows = sum(run.later_rows for run in runs) / len(steps)
    return median, median * sum(run.forward_seconds for run in runs) / sum(steps), rows


def _predicted(pair: _Pair, curve: VerifyCost, plain_step: float, plain_forward: float, plain_rows: float) -> float:
    """One prompt's speed-up of decoding as its own figures predict it."""
    run, steps = pair.run, len(pair.run.step_seconds)
    return predicted_speedup(
        curve,
        plain_step,
        plain_forward,
        tokens_per_step=len(pair.plain.step_seconds) / steps,
        rows_per_step=run.later_rows / steps,
        draft_seconds=run.draft_seconds / steps,
        plain_rows=plain_rows,
    )


def _sum(histogram: Counter[int]) -> int:
    return sum(value * times for value, times in histogram.items())


def _median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 4) if values else None
