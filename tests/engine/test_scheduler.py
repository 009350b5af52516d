"""Who runs: limits respected, first come first served, decoding before prompts, followers behind their leader."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.engine import Drafter
from hasten.engine.scheduler import Limits, Scheduler


@dataclass(eq=False)
class Waiter:
    """What the scheduler reads of a request: `left` prompt rows, then one row per step."""

    left: int
    leader: Waiter | None = None
    forerunner: Waiter | None = None
    started: bool = False
    drafter: Drafter = field(default_factory=Drafter)

    @property
    def decoding(self) -> SimpleNamespace:
        return SimpleNamespace(backlog=lambda request: 0 if request.started else request.left)


def scheduler(*requests: Waiter, **limits: int) -> Scheduler:
    made = Scheduler(Limits(**limits))
    for request in requests:
        made.add(request)
    return made


def advance(made: Scheduler) -> list[tuple[Waiter, int]]:
    """One step: what was planned, carried out; the rows of each, one where it decodes."""
    plan = [(each.request, each.piece) for each in made.plan()]
    for request, piece in plan:
        if request.started:
            assert piece == 0
        else:
            assert 1 <= piece <= request.left
            request.left -= piece
            request.started = request.left == 0
    return [(request, piece or 1) for request, piece in plan]


def test_nothing_to_do():
    made = scheduler()
    assert made.plan() == []
    assert len(made) == 0


def test_long_prompts_come_in_chunks_behind_decoding():
    first, second = Waiter(3), Waiter(20)
    made = scheduler(first, second, rows=8)
    assert advance(made) == [(first, 3), (second, 5)]
    assert advance(made) == [(first, 1), (second, 7)]
    assert advance(made) == [(first, 1), (second, 7)]
    assert advance(made) == [(first, 1), (second, 1)]
    assert second.started


def test_prompts_are_never_starved():
    """Where decoding alone fills the limit, prompts still get a row per step."""
    decoding, prompt = [Waiter(1, started=True) for _ in range(5)], Waiter(3)
    made = scheduler(*decoding, prompt, rows=4)
    for _ in range(3):
        assert advance(made) == [*((each, 1) for each in decoding), (prompt, 1)]
    assert prompt.started


def test_first_come_first_served():
    requests = [Waiter(4) for _ in range(5)]
    made = scheduler(*requests, sequences=2, rows=100)
    assert advance(made) == [(requests[0], 4), (requests[1], 4)]
    made.remove(requests[1])
    assert advance(made) == [(requests[0], 1), (requests[2], 4)]
    made.remove(requests[3])
    made.remove(requests[0])
    assert advance(made) == [(requests[2], 1), (requests[4], 4)]
    assert len(made) == 2
    made.remove(requests[0])  # harmless


def test_successors_wait_for_their_forerunner():
    first, other = Waiter(5), Waiter(3)
    second = Waiter(9, forerunner=first)
    made = scheduler(first, second, other, rows=4)
    assert advance(made) == [(first, 4)]
    assert made.successors(first) == [second] and made.successors(second) == []
    assert advance(made) == [(first, 1), (other, 3)]
    second.forerunner = None
    assert advance(made) == [(first, 1), (other, 1), (second, 2)]


def test_followers_wait_for_their_leader():
    leader = Waiter(10)
    followers = [Waiter(10, leader) for _ in range(2)]
    other = Waiter(2)
    made = scheduler(leader, *followers, other, sequences=2, rows=6)
    assert made.followers(leader) == followers
    assert advance(made) == [(leader, 6)]
    assert advance(made) == [(leader, 4)]
    followers[0].leader, followers[0].started = None, True
    assert made.followers(leader) == followers[1:]
    assert advance(made) == [(leader, 1), (followers[0], 1)]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(1, 12),
    st.randoms(use_true_random=False),
)
def test_limits_hold_and_everything_gets_done(lengths, sequences, rows, rng):
    requests = [Waiter(length) for length in lengths]
    made = scheduler(*requests, sequences=sequences, rows=rows)
    begun: list[Waiter] = []
    for _ in range(2000):
        if not len(made):
            break
        planned = advance(made)
        assert 0 < len(planned) <= sequences
        prompts = sum(count for request, count in planned if request.left or count > 1)
        assert prompts <= rows
        begun += [request for request, _ in planned if request not in begun]
        for request, _ in planned:
            if request.started and rng.random() < 0.5:
                made.remove(request)
    assert len(made) == 0
    assert begun == [request for request in requests if request in begun]
    assert len(begun) == len(requests)


def test_limits_are_positive():
    with pytest.raises(Exception, match="at least 1"):
        Limits(sequences=0)


def test_a_drafter_may_hold_its_requests_back():
    class Full(Drafter):
        room = False

        def admits(self, request):
            return self.room

    first, held, last = Waiter(3), Waiter(3, drafter=Full()), Waiter(3)
    made = scheduler(first, held, last)
    # First come, first served: nobody overtakes.
    assert [each.request for each in made.plan()] == [first]
    held.drafter.room = True
    assert [each.request for each in made.plan()] == [first, held, last]
