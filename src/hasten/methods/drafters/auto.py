"""Auto: several drafters at once, and a planner that verifies only what pays on this machine.

At every step the cheap drafters are asked first; the costlier ones only if their record promises more than the best
draft at hand. A draft's estimates are turned into measured probabilities (`Calibration`, per drafter over all requests,
and a factor of trust per request), and the planner cuts it to the nodes that pay by the verify-cost curve v(n), which
is measured once per model and machine. No nodes at all is plain decoding, on the same path.

Exactness: lossless, as its candidates are. Under `acceptance="max"` a sampled draft is verified whole, and is never
set against another one: a choice by the values of its samples would bias the result.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hasten.engine import Draft, Drafter, Observation, Request, Target, register
from hasten.engine.cost import VerifyCost, verify_cost
from hasten.engine.planner import Calibration, Planner
from hasten.engine.registry import create, is_lossless
from hasten.errors import UserError
from hasten.model.taps import Taps

CANDIDATES = "suffix/token-recycling"
CHEAP = 0.05
"""Share of a plain step below which a drafter is simply asked."""
TRIALS = 4
"""How often a costly drafter is asked before its record counts."""
LONGEST_SLEEP = 64
"""Steps for which a drafter without success is left alone, at most."""
FADE = 0.95
"""Weight of the past in running means, per drafted step."""


@dataclass(frozen=True)
class AutoParameters:
    """`candidates`: specifications separated by `/`, in the order in which they are asked.

    Empty takes the training-free ones, and the drafter that stands beside the target where there is one.

    Raises:
        UserError: a candidate that is lossy, or auto itself.
    """

    candidates: str = ""

    def __post_init__(self) -> None:
        for name in filter(None, self.candidates.split("/")):
            if name.partition(":")[0] == "auto":
                raise UserError("auto: it cannot be a candidate of itself")
            if not is_lossless(name):
                raise UserError(f"auto: {name} is lossy; candidates must be lossless")


@dataclass
class _Record:
    """One request's experience with one drafter."""

    promised: float = 0.0
    accepted: float = 0.0
    misses: int = 0
    sleep: int = 0

    @property
    def trust(self) -> float:
        """How much more or less was accepted than promised; one without experience."""
        return min(max((2.0 + self.accepted) / (2.0 + self.promised), 0.05), 2.0)


@dataclass
class _Candidate:
    """A drafter with what is known of it: means per request and step of drafting time, nodes and expected tokens."""

    drafter: Drafter
    calibration: Calibration = field(default_factory=Calibration)
    asked: int = 0
    seconds: float = 0.0
    size: float = 0.0
    gain: float = 0.0
    records: dict[int, _Record] = field(default_factory=dict)

    def record(self, request: Request) -> _Record:
        return self.records.setdefault(request.id, _Record())

    def ask(self, requests: Sequence[Request], budgets: Sequence[int]) -> tuple[list[Draft], float]:
        """Drafts, and seconds per request."""
        started = time.perf_counter()
        drafts = self.drafter.propose_all(requests, budgets)
        seconds = (time.perf_counter() - started) / len(requests)
        self.asked += 1
        # The first call loads and compiles things: it says nothing about those to come.
        self.seconds = seconds if self.asked <= 2 else FADE * self.seconds + (1 - FADE) * seconds
        return drafts, seconds

    def note(self, size: int, gain: float) -> None:
        """Remember how much of a draft paid, and the tokens that it promised."""
        weight = min(self.asked / (self.asked + 1), FADE)
        self.size = weight * self.size + (1 - weight) * size
        self.gain = weight * self.gain + (1 - weight) * gain


@dataclass
class _Choice:
    """The draft that a request goes into the step with.

    `rate` is the batch's tokens per second if this request alone drafts; `spent` the seconds of all drafters asked.
    """

    draft: Draft
    rate: float
    candidate: _Candidate | None = None
    probabilities: list[float] = field(default_factory=list)
    spent: float = 0.0


@register(
    "auto",
    family="drafters",
    exactness="lossless",
    paper="",
    title="The best of several drafters at every step, and only as much of it as pays",
    parameters=AutoParameters,
)
class Auto(Drafter):
    """One object per engine: what it learns about drafters serves all requests."""

    def __init__(self, target: Target, parameters: AutoParameters) -> None:
        names = parameters.candidates or CANDIDATES
        if not parameters.candidates and target.folder and Path(f"{target.folder.rstrip('/')}-draft").is_dir():
            names += "/draft-model"
        self.candidates = [_Candidate(create(name, target)) for name in names.split("/")]
        self.taps = tuple({site: None for each in self.candidates for site in each.drafter.taps})
        self._target = target
        self._planner: Planner | None = None
        self._chosen: dict[int, _Choice] = {}

    @property
    def cost(self) -> VerifyCost:
        """The curve it plans by."""
        return self._plans.cost

    @property
    def _plans(self) -> Planner:
        # Measured when it is needed, not for every engine that could use it.
        if self._planner is None:
            self._planner = Planner(verify_cost(self._target.model, self._target.folder))
        return self._planner

    @property
    def memory_bytes(self) -> int:
        return sum(each.drafter.memory_bytes for each in self.candidates)

    def begin(self, request: Request) -> None:
        for each in self.candidates:
            each.drafter.begin(request)

    def propose(self, request: Request, budget: int) -> Draft:
        return self.propose_all([request], [budget])[0]

    def propose_all(self, requests: Sequence[Request], budgets: Sequence[int]) -> list[Draft]:
        """Each request's best draft, cut to what pays in this batch."""
        batch = len(requests)
        context = sum(len(request.tokens) for request in requests) / batch
        plain = self._plans.rate(batch, batch, context, batch)
        choices = [_Choice(Draft(), plain) for _ in requests]
        for candidate in self.candidates:
            awake = [
                index
                for index, request in enumerate(requests)
                if self._worth_asking(candidate, request, choices[index], context, batch)
            ]
            if not awake:
                continue
            drafts, spent = candidate.ask([requests[i] for i in awake], [budgets[i] for i in awake])
            for index, draft in zip(awake, drafts, strict=True):
                choices[index].spent += spent
                self._compare(choices[index], candidate, requests[index], draft, context, batch)
        plan = self._plans.plan(
            [choice.probabilities for choice in choices], context, sum(choice.spent for choice in choices)
        )
        for request, choice, nodes in zip(requests, choices, plan.nodes, strict=True):
            if not choice.draft.drawn and len(nodes) < len(choice.draft):
                choice.draft = choice.draft.subset(nodes)
                choice.probabilities = [choice.probabilities[node] for node in nodes]
            self._chosen[request.id] = choice
        return [choice.draft for choice in choices]

    def _worth_asking(self, candidate: _Candidate, request: Request, best: _Choice, context: float, batch: int) -> bool:
        """Whether a drafter's record promises more than the best draft at hand, or there is no record yet."""
        if best.draft.drawn:
            return False
        record = candidate.record(request)
        if record.sleep > 0:
            record.sleep -= 1
            return False
        step = self._plans.cost.of(batch, context, batch)
        if candidate.asked < TRIALS or candidate.seconds < CHEAP * step:
            return True
        tokens = batch + candidate.gain * record.trust
        spent = best.spent + candidate.seconds
        return self._plans.rate(tokens, batch + round(candidate.size), context, batch, spent) > best.rate

    def _compare(
        self, best: _Choice, candidate: _Candidate, request: Request, draft: Draft, context: float, batch: int
    ) -> None:
        """Make a new draft the choice if it is better, at its best size, than the draft at hand at its own."""
        record = candidate.record(request)
        probabilities = candidate.calibration.probabilities(draft, record.trust)
        plan = self._plans.plan([probabilities], context, best.spent, others=batch - 1)
        if draft.drawn:
            # Sampled: taken before its values were known, so whole and without another look.
            candidate.note(len(draft), sum(probabilities))
        else:
            candidate.note(len(plan.nodes[0]), sum(probabilities[node] for node in plan.nodes[0]))
            if not plan.nodes[0] or plan.rate <= best.rate:
                if best.candidate is None:
                    # Not even better than plain decoding.
                    self._missed(record)
                return
        best.draft, best.rate, best.candidate, best.probabilities = draft, plan.rate, candidate, probabilities

    @staticmethod
    def _missed(record: _Record) -> None:
        """Leave a drafter alone for longer and longer while nothing comes of it."""
        record.misses += 1
        record.sleep = min(2 ** max(record.misses - 3, 0) - 1, LONGEST_SLEEP)

    def observe_prompt(self, request: Request, start: int, taps: Taps | None) -> None:
        for each in self.candidates:
            each.drafter.observe_prompt(request, start, taps)

    def observe(self, request: Request, seen: Observation) -> None:
        choice = self._chosen.pop(request.id, None)
        if choice is not None and choice.candidate is not None and seen.draft:
            self._learn(choice.candidate, request, choice, seen)
        for each in self.candidates:
            each.drafter.observe(request, seen)

    def _learn(self, candidate: _Candidate, request: Request, choice: _Choice, seen: Observation) -> None:
        """What the verdict says about a drafter and its estimates."""
        record = candidate.record(request)
        record.promised = FADE * record.promised + sum(candidate.calibration.probabilities(seen.draft))
        record.accepted = FADE * record.accepted + len(seen.path)
        candidate.calibration.observe(seen.draft, seen.path)
        if seen.path:
            record.misses = 0
        else:
            self._missed(record)

    def end(self, request: Request) -> None:
        self._chosen.pop(request.id, None)
        for each in self.candidates:
            each.records.pop(request.id, None)
            each.drafter.end(request)
