"""Choosing a method and its parameters for a model and a set of prompts, by successive halving.

Candidates decode the same prompts in turns with plain decoding. After each rung the better half goes on to more
prompts. What wins is tried on prompts that had no part in the choice: their speed-up is the one to expect.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from hasten.bench.compare import warm_engines
from hasten.bench.conversation import encode
from hasten.bench.lane import Lane, interleave
from hasten.bench.prompts import BenchPrompt
from hasten.bench.race import default_method
from hasten.engine import Engine, SamplingParams, decoders
from hasten.engine.creation import is_lossless
from hasten.engine.registry import Method, parse
from hasten.errors import UserError
from hasten.llm import LLM
from hasten.methods.heads.own import own_heads
from hasten.model import ModelConfig
from hasten.model.threads import spare_cores

SIZES = ("length", "nodes", "depth", "width", "drafts")
"""Names of the parameter that says how much is drafted: the first one that a method has is halved and doubled."""
GROUP = 7
"""Candidates that decode beside each other: more of them would hold as many caches at once."""
WORTHWHILE = 1.02
"""A speed-up below this is within the noise."""
HELD_OUT_SHARE = 0.25
"""Share of the time for the prompts that had no part in the choice."""
LOADING_SHARE = 0.4
"""Share of the time for loading candidates; those that are not ready by then are skipped."""
NO_GAIN = "nothing beat plain decoding on these prompts"
NOT_MEASURED = "nothing was measured in the time there was"
NO_CANDIDATES = "there was no candidate to try"


@dataclass
class Candidate:
    """What is known of one setting. `rung` is the last one it took part in, from 1; 0 before it was measured."""

    method: str
    rung: int = 0
    speedups: list[float] = field(default_factory=list)
    tokens: int = 0
    steps: int = 0

    @property
    def speedup(self) -> float | None:
        return statistics.median(self.speedups) if self.speedups else None

    def document(self) -> dict[str, Any]:
        """An entry of `candidates`."""
        return {
            "method": self.method,
            "speedup": None if self.speedup is None else round(self.speedup, 4),
            "tokens_per_step": round(self.tokens / self.steps, 4) if self.steps else None,
            "prompts": len(self.speedups),
            "rung": self.rung,
            "lossless": is_lossless(self.method),
        }


@dataclass
class TuneResult:
    """`expected` is the choice's speed-up on the held-out prompts: 1 for plain decoding, None if there was no time.

    `interrupted` is what ended the search early, if anything did.
    """

    choice: str
    reason: str
    expected: float | None
    held_out: int
    candidates: list[Candidate]
    skipped: dict[str, str]
    interrupted: KeyboardInterrupt | None
    seconds: float

    def document(self) -> dict[str, Any]:
        """The document of `hasten tune --json`, up to what the command adds."""
        return {
            "choice": self.choice,
            "reason": self.reason,
            "expected_speedup": None if self.expected is None else round(self.expected, 4),
            "held_out_prompts": self.held_out,
            "candidates": [candidate.document() for candidate in self.candidates],
            "skipped": [{"method": method, "reason": reason} for method, reason in self.skipped.items()],
            "interrupted": self.interrupted is not None,
            "seconds": round(self.seconds, 2),
        }


def default_candidates(config: ModelConfig, heads: Collection[str] = ()) -> tuple[list[str], dict[str, str]]:
    """All lossless methods for a model that need no further training, with up to three settings each; and why others
    are left out.

    Args:
        heads: methods that have their weights for this model.
    """
    chosen: list[str] = []
    skipped: dict[str, str] = {}
    for slug, method in decoders().items():
        if slug == "plain":
            continue
        if (method.role == "denoiser") != config.fills_canvas:
            skipped[slug] = "not for this model's kind of plain decoding"
        elif method.exactness != "lossless":
            skipped[slug] = "lossy: it would change the text"
        elif method.needs_training and slug not in heads and slug != default_method(config):
            skipped[slug] = "needs weights trained for the model: name it under --candidates with them"
        elif method.beside > spare_cores():
            skipped[slug] = "computes beside the model, whose threads have all cores: leave it one with --threads"
        else:
            chosen += settings(method)
    return chosen, skipped


def settings(method: Method) -> list[str]:
    """A method as it is, and with half and twice the draft where a parameter says how large it is."""
    specs = [method.slug]
    fields: dict[str, Any] = {item.name: item.default for item in dataclasses.fields(method.parameters)}
    size = next((name for name in SIZES if isinstance(fields.get(name), int) and fields[name] > 1), None)
    if size is not None:
        for value in (fields[size] // 2, fields[size] * 2):
            spec = f"{method.slug}:{size}={value}"
            try:
                parse(spec)
            except UserError:
                continue  # out of the method's range
            specs.append(spec)
    return specs


def tune(
    llm: LLM,
    prompts: Sequence[BenchPrompt],
    params: SamplingParams,
    seconds: float = 120.0,
    candidates: Sequence[str] | None = None,
    report: Callable[[float], None] = lambda seconds: None,
) -> TuneResult:
    """Find the fastest method. Ctrl-C ends the search early, with what is known by then.

    Args:
        candidates: specifications; if None, the registry's lossless methods that need no training, and those whose
            heads the model has.
        report: called with the seconds spent since the last call, for progress bars.

    Raises:
        UserError: fewer than two prompts, one that is too long, a candidate that is unknown or lacks something (those
            of the registry are skipped then).
    """
    if len(prompts) < 2:
        raise UserError("tune needs at least 2 prompts: one half to choose on, the other to check the choice")
    if candidates is None:
        names, skipped = default_candidates(llm.model.config, own_heads(llm.engine.target))
    else:
        names, skipped = list(dict.fromkeys(candidates)), {}
    names = [name for name in names if name != "plain"]
    for name in names:
        is_lossless(name)  # an unknown one fails here, before anything is loaded
    search = _Search(llm, params, seconds, report, skipped)
    try:
        ids = encode(llm, prompts, params)
        random.Random(0).shuffle(ids)
        search.load(names, strict=candidates is not None)
        search.choose(ids[::2])
        search.check(ids[1::2])
    except KeyboardInterrupt as interruption:
        search.interrupted = interruption
    finally:
        search.close()
    return search.result()


class _Search:
    """The state of one search; whatever interrupts it, `result` says what is known."""

    def __init__(
        self, llm: LLM, params: SamplingParams, seconds: float, report: Callable[[float], None], skipped: dict[str, str]
    ) -> None:
        self.llm, self.params, self.report, self.skipped = llm, params, report, skipped
        self.started = self.reported = time.perf_counter()
        self.end = self.started + seconds
        self.choosing_end = self.started + seconds * (1 - HELD_OUT_SHARE)
        self.loading_end = self.started + seconds * LOADING_SHARE
        self.engines: dict[str, Engine] = {}
        self.candidates: list[Candidate] = []
        self.checked: list[float] = []
        self.interrupted: KeyboardInterrupt | None = None

    def load(self, names: Sequence[str], strict: bool) -> None:
        """Make every candidate ready to run."""
        self.engines = warm_engines(self.llm, ["plain"])
        for name in names:
            slug = name.partition(":")[0]
            if slug in self.skipped:
                continue  # another setting of it lacked something
            if time.perf_counter() > self.loading_end and self.candidates:
                self.skipped[name] = "no time was left to load it"
                continue
            try:
                self.engines |= warm_engines(self.llm, [name])
            except UserError as error:
                if strict:
                    raise
                self.skipped[slug] = str(error)
            else:
                self.candidates.append(Candidate(name))
            self._tick()

    def choose(self, prompts: Sequence[list[int]]) -> None:
        """Successive halving: each rung gives the better half of the one before new prompts, and more of them."""
        field, done = list(self.candidates), 0
        rungs = max(1, math.ceil(math.log2(max(len(field), 1))))
        for rung in range(1, rungs + 1):
            reach = max(done + 1, math.ceil(len(prompts) / 2 ** (rungs - rung)))
            now = time.perf_counter()
            deadline = now + (self.choosing_end - now) / (rungs - rung + 1)
            done += self._rung(field, prompts[done:reach], rung, deadline)
            field = _best_first(field)[: max(1, len(field) // 2)]
            self._keep({"plain", *(candidate.method for candidate in field)})

    def close(self) -> None:
        """Give back what all engines hold."""
        self._keep(())

    def _keep(self, names: Collection[str]) -> None:
        """Give back what other engines hold: memory, and the processes of some drafters."""
        self.engines = {name: engine for name, engine in self.engines.items() if name in names}
        # An engine and what it is made of know each other.
        gc.collect()

    def check(self, prompts: Sequence[list[int]]) -> None:
        """The winner on prompts that had no part in its choice."""
        winner = self.winner
        if winner is None:
            return
        for ids in prompts:
            left = self.end - time.perf_counter()
            if left <= 0:
                break
            self.checked += [speedup for speedup, _ in self._decode([winner], ids, left).values()]

    @property
    def winner(self) -> Candidate | None:
        """The best of those that came furthest, if it is worth it."""
        best = next(iter(_best_first(self.candidates)), None)
        return best if best is not None and (best.speedup or 0.0) >= WORTHWHILE else None

    def _rung(self, field: Sequence[Candidate], prompts: Sequence[list[int]], rung: int, deadline: float) -> int:
        """Decode prompts by a field of candidates until the time is up; the number of prompts that all have seen."""
        groups = [field[start : start + GROUP] for start in range(0, len(field), GROUP)]
        for place, ids in enumerate(prompts):
            for number, group in enumerate(groups):
                limit = (deadline - time.perf_counter()) / (len(groups) - number)
                if limit <= 0:
                    return place
                for method, (speedup, lane) in self._decode(group, ids, limit).items():
                    candidate = next(each for each in group if each.method == method)
                    candidate.rung = rung
                    candidate.speedups.append(speedup)
                    candidate.tokens += lane.request.statistics.tokens
                    candidate.steps += lane.request.statistics.steps
        return len(prompts)

    def _decode(self, group: Sequence[Candidate], ids: list[int], limit: float) -> dict[str, tuple[float, Lane]]:
        """Speed-up and lane of each candidate on one prompt, cut off after `limit` seconds.

        The lanes take turns on equal clocks, so that tokens per second compare at any time.
        """
        stop = time.perf_counter() + limit
        names = ["plain", *(candidate.method for candidate in group)]
        lanes: list[Lane] = []
        try:
            for name in names:
                lanes.append(Lane(self.llm, self.engines[name], name, ids, self.params))
            for _ in interleave(lanes):
                if time.perf_counter() > stop:
                    break
        finally:
            for lane in lanes:
                lane.abort()
            self._tick()
        plain, *others = lanes
        if not plain.tokens:
            return {}
        return {lane.method: (lane.tokens_per_second / plain.tokens_per_second, lane) for lane in others if lane.tokens}

    def _tick(self) -> None:
        """Tell the progress bar."""
        now = time.perf_counter()
        self.report(now - self.reported)
        self.reported = now

    def result(self) -> TuneResult:
        """What is known now."""
        winner, expected = self.winner, statistics.median(self.checked) if self.checked else None
        choice = "plain"
        if not any(candidate.speedups for candidate in self.candidates):
            reason = NOT_MEASURED if self.candidates else NO_CANDIDATES
        elif winner is None:
            reason = NO_GAIN
        elif expected is None:
            choice, reason = winner.method, "fastest so far, but there was no time to check it on held-out prompts"
        elif expected < WORTHWHILE:
            reason = f"{NO_GAIN}: {winner.method} looked fastest, but was not on the held-out ones"
        else:
            choice, reason = winner.method, "fastest, on held-out prompts too"
        return TuneResult(
            choice=choice,
            reason=reason,
            expected=1.0 if reason.startswith(NO_GAIN) else expected,
            held_out=len(self.checked),
            candidates=_best_first(self.candidates),
            skipped=self.skipped,
            interrupted=self.interrupted,
            seconds=time.perf_counter() - self.started,
        )


def _best_first(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that came furthest first, the faster one first among them."""
    return sorted(candidates, key=lambda candidate: (-candidate.rung, -(candidate.speedup or 0.0)))
