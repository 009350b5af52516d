"""Several drafters in one: the first that has something to say is heard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hasten.engine.drafting.draft import Draft
from hasten.engine.drafting.drafter import Drafter, Observation
from hasten.engine.request import Request
from hasten.model.taps import Taps


def weights_of(drafters: Sequence[Drafter]) -> dict[int, int]:
    """The weights of several drafters, each once; see `Drafter.weights`."""
    return {piece: size for drafter in drafters for piece, size in drafter.weights.items()}


def memory_of(drafters: Sequence[Drafter]) -> int:
    """Bytes that several drafters hold; what they share counts once."""
    own = sum(drafter.memory_bytes - sum(drafter.weights.values()) for drafter in drafters)
    return own + sum(weights_of(drafters).values())


class Several(Drafter):
    """What a drafter made of others needs of all of them.

    Args:
        drafters: its parts.
    """

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        self.drafters = list(drafters)
        self.taps = tuple({site: None for drafter in drafters for site in drafter.taps})

    @property
    def reads_whole(self) -> bool:
        return any(drafter.reads_whole for drafter in self.drafters)

    @property
    def memory_bytes(self) -> int:
        return memory_of(self.drafters)

    @property
    def weights(self) -> Mapping[int, int]:
        return weights_of(self.drafters)

    def growth_bytes(self, requests: Sequence[Request], rows: int = 0) -> int:
        return sum(drafter.growth_bytes(requests, rows) for drafter in self.drafters)

    def scratch_bytes(self, requests: Sequence[Request], nodes: int) -> int:
        # What one has drafted stays while the next drafts.
        return sum(drafter.scratch_bytes(requests, nodes) for drafter in self.drafters)

    def prepare(self) -> None:
        for drafter in self.drafters:
            drafter.prepare()

    def observe_prompt(self, request: Request, start: int, taps: Taps | None) -> None:
        for drafter in self.drafters:
            drafter.observe_prompt(request, start, taps)


class FirstOf(Several):
    """Asks its drafters in order, each for the requests that those before it left without a draft.

    All of them see every prompt and every verification, so that each one's state is whole whenever its turn comes.
    Exactness: that of its parts, since one draft always comes from one drafter.
    """

    def begin(self, request: Request) -> None:
        for drafter in self.drafters:
            drafter.begin(request)

    def propose(self, request: Request, budget: int) -> Draft:
        return self.propose_all([request], [budget])[0]

    def propose_all(self, requests: Sequence[Request], budgets: Sequence[int]) -> list[Draft]:
        drafts = [Draft() for _ in requests]
        for drafter in self.drafters:
            silent = [index for index, draft in enumerate(drafts) if not draft]
            if not silent:
                break
            asked = drafter.propose_all([requests[i] for i in silent], [budgets[i] for i in silent])
            for index, draft in zip(silent, asked, strict=True):
                drafts[index] = draft
        return drafts

    def observe(self, request: Request, seen: Observation) -> None:
        for drafter in self.drafters:
            drafter.observe(request, seen)

    def end(self, request: Request) -> None:
        for drafter in self.drafters:
            drafter.end(request)
