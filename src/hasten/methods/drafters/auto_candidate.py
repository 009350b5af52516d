"""What `auto` knows of each drafter: what its drafts cost and gain, over all requests and in each one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from hasten.engine import Draft, Drafter, Request
from hasten.engine.planner import Calibration
from hasten.methods.drafters.auto_experience import Outcome

OPTIMISM = 0.5
"""Share by which a drafter is expected to do better than it did, before its first draft in a request."""
PATIENCE = 4
"""Drafts in a row that come to nothing before a drafter rests."""
LONGEST_REST = 16
"""Steps for which a drafter without success is left alone, at most."""
FADE = 0.95
"""Weight of the past in running means, per step."""


@dataclass
class Record:
    """One request's experience with one drafter; sums fade.

    Attributes:
        usual: what was expected when the request began.
        weight: drafts that this expectation is worth.
        promised, accepted: tokens of verified drafts.
        gained: tokens of `asks` drafts: accepted ones, or expected ones where another draft was verified.
        misses: drafts in a row that came to nothing.
        rest: steps until it may be asked again.
        idle: steps since it was asked.
    """

    usual: Outcome
    weight: float
    promised: float = 0.0
    accepted: float = 0.0
    gained: float = 0.0
    asks: float = 0.0
    misses: int = 0
    rest: int = 0
    idle: int = 0

    @property
    def trust(self) -> float:
        """How much more or less was accepted than promised."""
        return min(max((2.0 * self.usual.trust + self.accepted) / (2.0 + self.promised), 0.05), 2.0)

    @property
    def gain(self) -> float:
        """Tokens to hope for from a draft: more than the mean, the fewer drafts it comes from."""
        mean = (self.weight * self.usual.gain + self.gained) / (self.weight + self.asks)
        return mean * (1.0 + OPTIMISM / (1.0 + self.asks))

    @property
    def outcome(self) -> Outcome | None:
        """In sum; None without drafts."""
        return Outcome(self.gained / self.asks, self.trust) if self.asks else None

    def note(self, gain: float) -> None:
        """Remember what a draft gained."""
        self.gained, self.asks = FADE * self.gained + gain, FADE * self.asks + 1.0

    def missed(self) -> None:
        """Rest for longer and longer while nothing comes of the drafts."""
        self.misses += 1
        self.rest = min(2 ** max(self.misses - PATIENCE, 0) - 1, LONGEST_REST)


@dataclass
class Mean:
    """A running mean that starts exact, and fades."""

    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += max(1.0 / self.count, 1.0 - FADE) * (value - self.value)


@dataclass
class Candidate:
    """A drafter, or plain decoding, with what is known of it.

    Attributes:
        drafter: None for plain decoding.
        seconds: per draft and request.
        reading: further seconds of a request's first draft, per token read.
        extra: seconds of a step beyond what the verify-cost curve says; a drafter may leave cold caches behind.
        size: nodes that paid.
        records: of running requests, by id.
    """

    drafter: Drafter | None = None
    calibration: Calibration = field(default_factory=Calibration)
    seconds: Mean = field(default_factory=Mean)
    reading: Mean = field(default_factory=Mean)
    extra: Mean = field(default_factory=lambda: Mean(0.0, 16))
    size: Mean = field(default_factory=lambda: Mean(4.0, 1))
    records: dict[int, Record] = field(default_factory=dict)

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

    def note(self, request: Request, size: int, gain: float) -> None:
        """Remember what came of a draft."""
        self.records[request.id].note(gain)
        self.size.add(size)
