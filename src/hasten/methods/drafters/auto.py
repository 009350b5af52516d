"""Auto: several drafters at once, and a planner that verifies only what pays on this machine.

At every step the cheap drafters are asked first; a costlier one, the most promising before the others, only if its
record promises more than the best draft at hand. A record begins with what drafts gained on prompts that were alike
(`auto_experience`) and goes on with what they gain in the request; a drafter rests that costs more than it saves, by
all that it takes. A draft's estimates are turned into measured probabilities (`Calibration`, per drafter over a
tenant's requests, and a factor of trust per request). The planner cuts it to the nodes that pay by the verify-cost
curve v(n), which is measured once per model and machine. No nodes at all is plain decoding, on the same path.

Exactness: lossless, as its candidates are. Under `acceptance="max"` a sampled draft is verified whole, and is never
set against another one: a choice by the values of its samples would bias the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from hasten.engine import Draft, Observation, Request, Target, register
from hasten.engine.creation import create, is_lossless, refuse_alone
from hasten.engine.drafting.composition import Several
from hasten.engine.drafting.cost import VerifyCost, verify_cost
from hasten.engine.drafting.planner import SUREST, Planner
from hasten.engine.registry import split
from hasten.errors import UserError
from hasten.methods.drafters.auto_candidate import Asked, Candidate, Record, Typical
from hasten.methods.drafters.auto_experience import Experience
from hasten.methods.drafters.small_model import beside, is_whole
from hasten.methods.heads.own import best_head

CANDIDATES = "suffix"
"""What needs no training, and costs least: `blend` is right more often, at more time per step than that saves."""
CHEAP = 0.1
"""Share of a plain step below which a drafter is simply asked, unless it rests."""


@dataclass(frozen=True)
class AutoParameters:
    """`candidates`: specifications separated by `/`, in the order in which they are asked.

    Raises:
        UserError: a candidate that is lossy, or auto itself.
    """

    candidates: str = CANDIDATES

    def __post_init__(self) -> None:
        for name in split(self.candidates, "/"):
            if name.partition(":")[0] == "auto":
                raise UserError("auto: it cannot be a candidate of itself")
            if not is_lossless(name):
                raise UserError(f"auto: {name} is lossy; candidates must be lossless")


@dataclass
class _Step:
    """What the requests of a batch go into together.

    Attributes:
        rows: of all of them and their drafts.
        context: mean tokens.
        batch: sequences.
        chosen: whose drafts they are.
        judged: whether its seconds are in the record.
    """

    rows: int
    context: float
    batch: int
    chosen: list[Candidate]
    judged: bool = False


@dataclass
class _Choice:
    """The draft that a request goes into the step with.

    Attributes:
        tokens: to expect of it, the target's own one not counted.
        asked: all drafts of the step, by whose they are.
        spent: seconds of all drafters asked.
        clock: the request's forward seconds before the step.
    """

    draft: Draft
    candidate: Candidate
    asked: list[tuple[Candidate, Asked]] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    tokens: float = 0.0
    spent: float = 0.0
    clock: float = 0.0


def with_own(target: Target) -> dict[str, Any]:
    """Where a target has a head, or a small model stands beside it, these are candidates, too."""
    slug, folder = best_head(target), beside(target)
    # Its drafts are cut here, beside the others'.
    head = None if slug is None else f"{slug}:sized=false"
    small = "draft-model" if folder is not None and is_whole(folder) else None
    return {"candidates": "/".join(filter(None, (CANDIDATES, head, small)))}


@register(
    "auto",
    family="drafters",
    exactness="lossless",
    paper="",
    title="The best of several drafters, as far as it pays",
    parameters=AutoParameters,
    defaults=with_own,
)
class Auto(Several):
    """One object per engine: what it learns of times serves all requests, what it learns from texts their tenant's."""

    def __init__(self, target: Target, parameters: AutoParameters) -> None:
        names = split(parameters.candidates, "/")
        super().__init__([create(name, target) for name in names])
        for name, drafter in zip(names, self.drafters, strict=True):
            refuse_alone(name, drafter, "a candidate of auto")
        self.candidates = [Candidate(drafter) for drafter in self.drafters]
        self._plain = Candidate()
        self._pace = Typical([1.0])
        self._target = target
        self._planner: Planner | None = None
        self._experience = Experience(len(self.candidates))
        self._chosen: dict[int, tuple[_Choice, _Step]] = {}

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

    def prepare(self) -> None:
        """Measures the curve, unless it is known; the one that is kept on disk is of the fastest passes."""
        _ = self._plans
        super().prepare()

    def begin(self, request: Request) -> None:
        expected = self._experience.expect(request.params.tenant, request.tokens)
        for each, outcome in zip(self.candidates, expected.outcomes, strict=True):
            each.records[request.id] = Record(outcome, expected.weight)
        for drafter in self.drafters:
            drafter.begin(request)

    def propose(self, request: Request, budget: int) -> Draft:
        return self.propose_all([request], [budget])[0]

    def propose_all(self, requests: Sequence[Request], budgets: Sequence[int]) -> list[Draft]:
        """Each request's best draft, cut to what pays in this batch."""
        if self._all_rest(requests):
            return [Draft() for _ in requests]
        batch = len(requests)
        context = sum(len(request.tokens) for request in requests) / batch
        choices = [_Choice(Draft(), self._plain) for _ in requests]
        costly = self._costly(context, batch)
        for candidate in self._in_turn(costly, requests, context, batch):
            worth = [
                index
                for index, request in enumerate(requests)
                if self._worth_asking(candidate, candidate in costly, request, choices[index], context, batch)
            ]
            if not worth:
                continue
            drafts, spent = candidate.ask([requests[i] for i in worth], [budgets[i] for i in worth])
            for index, draft in zip(worth, drafts, strict=True):
                choices[index].spent += spent
                self._compare(choices[index], candidate, requests[index], draft, context, batch)
        if batch > 1:
            self._cut(choices, context)
        rows = batch + sum(len(choice.draft) for choice in choices)
        step = _Step(rows, context, batch, [choice.candidate for choice in choices])
        for request, choice in zip(requests, choices, strict=True):
            choice.clock = request.statistics.forward_seconds
            self._chosen[request.id] = choice, step
        return [choice.draft for choice in choices]

    def _all_rest(self, requests: Sequence[Request]) -> bool:
        """Whether no drafter may be asked for any of these; then the step counts as rested, without further thought."""
        records = [each.records[request.id] for each in self.candidates for request in requests]
        if any(record.rest == 0 for record in records):
            return False
        for record in records:
            record.rest -= 1
        return True

    def _rate(self, choice: _Choice, context: float, batch: int) -> float:
        """The batch's tokens per second if this request alone drafts."""
        spent = choice.spent + choice.candidate.extra.value
        return self._plans.rate(batch + choice.tokens, batch + len(choice.draft), context, batch, spent)

    def _costly(self, context: float, batch: int) -> list[Candidate]:
        """Drafters that are known to take so long that they are asked only where that is worth it."""
        least = CHEAP * self._plans.seconds(batch, context, batch)
        return [each for each in self.candidates if each.known and each.spent >= least]

    def _in_turn(
        self, costly: Sequence[Candidate], requests: Sequence[Request], context: float, batch: int
    ) -> Sequence[Candidate]:
        """Candidates as they are asked: cheap and new ones in their order, then those that promise most.

        One that comes second is asked on top of what the first one took.
        """
        if len(costly) < 2:
            return self.candidates

        def promised(candidate: Candidate) -> float:
            if candidate not in costly:
                return inf
            return sum(self._promised(candidate, request, 0.0, context, batch) for request in requests)

        # Those that promise as much keep their order.
        return sorted(self.candidates, key=promised, reverse=True)

    def _promised(self, candidate: Candidate, request: Request, spent: float, context: float, batch: int) -> float:
        """The batch's tokens per second if a drafter does what its record lets hope, so many seconds later."""
        record = candidate.records[request.id]
        tokens, rows = batch + record.gain, batch + candidate.learned(request.params.tenant).size
        seconds = spent + candidate.spent + candidate.extra.value
        if not record.asks:
            # Reading the prompt is paid for by all drafts that will be made.
            seconds += candidate.reading.value * len(request.tokens) / max(record.usual.asks, 1.0)
        return self._plans.rate(tokens, rows, context, batch, seconds)

    def _worth_asking(
        self, candidate: Candidate, costly: bool, request: Request, best: _Choice, context: float, batch: int
    ) -> bool:
        """Whether a drafter is new, costs next to nothing, or promises more than the best draft at hand."""
        if best.draft.drawn:
            return False
        record = candidate.records[request.id]
        if record.rest > 0:
            record.rest -= 1
            return False
        lessons = candidate.learned(request.params.tenant)
        lessons.idle += 1
        record.retried = False
        if costly:
            rate = self._promised(candidate, request, best.spent, context, batch)
            record.retried = rate <= self._rate(best, context, batch)
            if record.retried and lessons.idle <= lessons.patience:
                return False
        lessons.idle = 0
        return True

    def _compare(
        self, best: _Choice, candidate: Candidate, request: Request, draft: Draft, context: float, batch: int
    ) -> None:
        """Make a new draft the choice if it is better, at its best size, than the draft at hand."""
        whole, lessons, nodes = draft, candidate.learned(request.params.tenant), list(range(len(draft)))
        promised = lessons.calibration.probabilities(draft)
        trust = candidate.records[request.id].trust
        probabilities = [min(promise * trust, SUREST) for promise in promised]
        better = True
        # A sampled draft was taken before its values were known: so it stays whole, and is not compared.
        if not draft.drawn:
            plan = self._plans.plan([probabilities], context, best.spent + candidate.extra.value, others=batch - 1)
            nodes = plan.nodes[0]
            better = bool(nodes) and plan.rate > self._rate(best, context, batch)
            probabilities = [probabilities[node] for node in nodes]
            if len(nodes) < len(draft):
                draft = draft.subset(nodes)
        best.asked.append((candidate, Asked(whole, promised, nodes, sum(probabilities))))
        lessons.verified(len(draft))
        if not better:
            return
        best.draft, best.candidate, best.probabilities = draft, candidate, probabilities
        best.tokens = sum(probabilities)

    def _cut(self, choices: Sequence[_Choice], context: float) -> None:
        """Cut the drafts of a batch together: every row makes the step dearer for all."""
        spent = sum(choice.spent for choice in choices)
        plan = self._plans.plan([choice.probabilities for choice in choices], context, spent)
        for choice, nodes in zip(choices, plan.nodes, strict=True):
            if not choice.draft.drawn and len(nodes) < len(choice.draft):
                choice.draft = choice.draft.subset(nodes)
                choice.probabilities = [choice.probabilities[node] for node in nodes]

    def observe(self, request: Request, seen: Observation) -> None:
        choice, step = self._chosen.pop(request.id, (None, None))
        if choice is not None and step is not None:
            self._judge(step, request.statistics.forward_seconds - choice.clock, seen.rows)
            for candidate, asked in choice.asked:
                candidate.learn(request, asked, seen.tokens, self._cost(candidate, asked, step))
        for candidate in self.candidates:
            # One that rests is left alone, unless it needs the hidden states of every token.
            if (candidate.drafter and candidate.drafter.taps) or not candidate.records[request.id].rest:
                candidate.watch(request, seen)

    def _cost(self, candidate: Candidate, asked: Asked, step: _Step) -> float:
        """Of a draft and its rows, in what the batch takes for a token without them."""
        alone = self._plans.seconds(step.batch, step.context, step.batch)
        rows = self._plans.seconds(step.batch + len(asked.nodes), step.context, step.batch)
        return step.batch * (rows - alone + candidate.spent) / alone

    def _judge(self, step: _Step, took: float, rows: int) -> None:
        """Take a step's seconds into the record: once, whoever sees it, and only if nothing else was in it.

        The curve says nothing of a step that also read prompts, or served other methods.
        """
        if step.judged or rows > step.rows:
            return
        step.judged = True
        forecast = self._plans.seconds(rows, step.context, step.batch)
        for candidate in (self._plain, *self.candidates):
            if any(candidate is each for each in step.chosen):
                candidate.took(max(took - forecast, 0.0))
            else:
                candidate.passed_over()
        if took > 0 and forecast > 0:
            self._pace.add(self._plans.pace * took / forecast)
            self._plans.pace = self._pace.value

    def end(self, request: Request) -> None:
        self._chosen.pop(request.id, None)
        records = [each.records.pop(request.id, None) for each in self.candidates]
        if request.started:
            outcomes = [None if record is None else record.outcome for record in records]
            self._experience.remember(request.params.tenant, request.tokens[: request.prompt_length], outcomes)
        for drafter in self.drafters:
            drafter.end(request)
