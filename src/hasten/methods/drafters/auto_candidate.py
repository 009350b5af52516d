"""What `auto` knows of each drafter: what its drafts cost and gain, over all requests and in each one."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hasten.engine import Draft, Drafter, Observation, Request
from hasten.engine.drafting.planner import Calibration
from hasten.methods.drafters.auto_experience import Outcome

OPTIMISM = 0.3
"""Share by which a drafter is expected to do better than it did, before its first draft in a request."""
LEAST_START = 0.5
"""Trust that a drafter gets in a new request, whatever it did in alike ones."""
CREDIT = 0.5
"""Plain steps that a drafter may lose in a request before it rests, if alike requests neither gained nor lost by it."""
HOPE = 8.0
"""Drafts whose usual profit is added to the credit."""
LEAST_CREDIT, MOST_CREDIT = 0.1, 4.0
"""Limits of both together: one that lost in alike requests is tried again, and none loses without end."""
OVERHEAD = 0.01
"""Of a plain step: what asking and planning take beside the drafter."""
LONGEST_REST = 16
"""Steps for which a drafter that does not pay is left alone, at most."""
TRIALS = 8
"""How often a drafter is asked before its times and its record count."""
RETRIAL, RAREST = 64, 512
"""Steps after which a drafter gets another chance, whatever its record: texts change, and so does the machine. Each
chance that was in vain doubles them, up to the second: where there is a prompt to read first, one takes several steps.
"""
LATEST = 15
"""Measured times that a median is taken of."""
TENANTS = 64
"""Tenants whose lessons are kept; the one that was not seen for longest goes first."""
FADE = 0.95
"""Weight of the past in running means, per step."""


@dataclass
class Record:
    """One request's experience with one drafter; sums fade.

    Attributes:
        usual: what was expected when the request began.
        weight: drafts that this expectation is worth.
        promised, accepted: tokens of drafts, verified or not, as far as what came tells.
        gained: tokens of `asks` drafts.
        count: drafts, without fading.
        profit: plain steps that its drafts saved, less what they and their rows took.
        balance: the same, with the credit that it began with.
        losses: drafts in a row that left the balance below zero.
        rest: steps until it may be asked again.
        retried: whether it was asked last against its record.
    """

    usual: Outcome
    weight: float
    promised: float = 0.0
    accepted: float = 0.0
    gained: float = 0.0
    asks: float = 0.0
    count: int = 0
    profit: float = 0.0
    balance: float = field(init=False)
    losses: int = 0
    rest: int = 0
    retried: bool = False

    def __post_init__(self) -> None:
        self.balance = min(max(CREDIT + HOPE * self.usual.profit, LEAST_CREDIT), MOST_CREDIT)

    @property
    def trust(self) -> float:
        """How much more or less was accepted than promised."""
        start = max(self.usual.trust, LEAST_START)
        return min(max((2.0 * start + self.accepted) / (2.0 + self.promised), 0.05), 2.0)

    @property
    def gain(self) -> float:
        """Tokens to hope for from a draft: more than the mean, the fewer drafts it comes from."""
        mean = (self.weight * self.usual.gain + self.gained) / (self.weight + self.asks)
        return mean * (1.0 + OPTIMISM / (1.0 + self.asks))

    @property
    def outcome(self) -> Outcome | None:
        """In sum; None without drafts."""
        return Outcome(self.gained / self.asks, self.trust, self.count, self.profit / self.asks) if self.asks else None

    def note(self, gain: float) -> None:
        """Remember what a draft gained."""
        self.gained, self.asks = FADE * self.gained + gain, FADE * self.asks + 1.0
        self.count += 1

    def settle(self, profit: float) -> None:
        """A draft saved so many plain steps; while they are lost, rest for longer and longer."""
        self.profit = FADE * self.profit + profit
        self.balance = max(FADE * self.balance + profit, -CREDIT)
        self.losses = self.losses + 1 if self.balance < 0 else 0
        self.rest = min(2**self.losses - 1, LONGEST_REST)


class Typical:
    """The median of the latest values: what a first call or a hiccup of the machine adds does not count.

    Args:
        start: values to begin with.
    """

    def __init__(self, start: Sequence[float] = ()) -> None:
        self._latest = deque(start, maxlen=LATEST)
        self.count = 0
        self.value = statistics.median(start) if start else 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self._latest.append(value)
        # As `statistics.median`, which takes several times as long: this is done a few times per step.
        ordered, middle = sorted(self._latest), len(self._latest) // 2
        self.value = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


@dataclass
class Lessons:
    """What a drafter's drafts showed on one tenant's texts.

    Attributes:
        calibration: how far its estimates hold.
        size: nodes that paid, the mean.
        idle: steps since it was asked, of all requests.
        patience: so many of them may be before it is tried again.
    """

    calibration: Calibration = field(default_factory=Calibration)
    size: float = 4.0
    idle: int = 0
    patience: int = RETRIAL

    def verified(self, nodes: int) -> None:
        """So many nodes of a draft paid."""
        self.size = FADE * self.size + (1 - FADE) * nodes

    def tried(self, profit: float, again: bool) -> None:
        """A draft saved so many plain steps; `again`: it was one more chance."""
        if profit > 0:
            self.patience = RETRIAL
        elif again:
            self.patience = min(2 * self.patience, RAREST)


class Asked(NamedTuple):
    """A draft as it was made, and what of it pays.

    Attributes:
        draft: whole.
        promised: probabilities of its nodes, without the request's own record.
        nodes: of it, that pay.
        expected: tokens of these.
    """

    draft: Draft
    promised: Sequence[float]
    nodes: Sequence[int]
    expected: float


@dataclass(eq=False)
class Candidate:
    """A drafter, or plain decoding, with what is known of it.

    Attributes:
        drafter: None for plain decoding.
        seconds: per draft and request.
        watching: seconds of being shown what was verified.
        reading: further seconds of a request's first draft, per token read.
        extra: seconds of a step beyond what the verify-cost curve says; a drafter may leave cold caches behind.
        unchosen: steps since it was chosen.
        lessons: by tenant, the one seen last at the end.
        records: of running requests, by id.
    """

    drafter: Drafter | None = None
    seconds: Typical = field(default_factory=Typical)
    watching: Typical = field(default_factory=Typical)
    reading: Typical = field(default_factory=Typical)
    extra: Typical = field(default_factory=lambda: Typical([0.0] * (LATEST // 2)))
    unchosen: int = 0
    lessons: dict[str, Lessons] = field(default_factory=dict)
    records: dict[int, Record] = field(default_factory=dict)

    @property
    def spent(self) -> float:
        """Seconds that a draft takes in all."""
        return self.seconds.value + self.watching.value

    @property
    def known(self) -> bool:
        """Whether it was asked often enough for its times and its record to count."""
        return self.seconds.count >= 2 and self.seconds.count + self.reading.count >= TRIALS

    def ask(self, requests: Sequence[Request], budgets: Sequence[int]) -> tuple[list[Draft], float]:
        """Drafts, and seconds per request."""
        assert self.drafter is not None
        started = time.perf_counter()
        drafts = self.drafter.propose_all(requests, budgets)
        seconds = (time.perf_counter() - started) / len(requests)
        read = sum(len(request.tokens) for request in requests if not self.records[request.id].asks) / len(requests)
        if read:
            self.reading.add(max(0.0, seconds - self.seconds.value) / read)
        else:
            self.seconds.add(seconds)
        return drafts, seconds

    def took(self, extra: float) -> None:
        """A step with a draft of its took so many seconds beyond the curve."""
        self.extra.add(extra)
        self.unchosen = 0

    def passed_over(self) -> None:
        """A step went without it: what keeps it from being chosen cannot be measured, so in time it is forgotten."""
        self.unchosen += 1
        if self.unchosen >= RETRIAL:
            self.extra, self.unchosen = Typical([0.0]), 0

    def learned(self, tenant: str) -> Lessons:
        """A tenant's lessons, begun on demand."""
        lessons = self.lessons[tenant] = self.lessons.pop(tenant) if tenant in self.lessons else Lessons()
        if len(self.lessons) > TENANTS:
            del self.lessons[next(iter(self.lessons))]
        return lessons

    def watch(self, request: Request, seen: Observation) -> None:
        """Show the drafter what was verified."""
        assert self.drafter is not None
        started = time.perf_counter()
        self.drafter.observe(request, seen)
        self.watching.add(time.perf_counter() - started)

    def learn(self, request: Request, asked: Asked, came: Sequence[int], cost: float) -> None:
        """Judge a draft by the tokens that came, whoever drafted them.

        Args:
            cost: of the draft and its rows, in plain steps.
        """
        record, draft, verdicts = self.records[request.id], asked.draft, asked.draft.judged(came)
        right = sum(verdict is True for verdict in verdicts)
        record.promised = FADE * record.promised + sum(
            promise for promise, verdict in zip(asked.promised, verdicts, strict=True) if verdict is not None
        )
        record.accepted = FADE * record.accepted + right
        # Of what pays only: the rest would have taken rows. Where all that is known was right, more was to come.
        gained = float(sum(verdicts[node] is True for node in asked.nodes))
        record.note(max(gained, asked.expected) if right and None in verdicts else gained)
        lessons = self.learned(request.params.tenant)
        profit = gained - cost - OVERHEAD
        lessons.calibration.observe(draft, verdicts)
        lessons.tried(profit, record.retried)
        record.settle(profit)
