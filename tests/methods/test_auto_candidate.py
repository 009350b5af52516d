"""The records that `auto` keeps of drafters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hasten.engine import Draft
from hasten.methods.drafters.auto_candidate import (
    CREDIT,
    HOPE,
    LATEST,
    LEAST_CREDIT,
    LEAST_START,
    LONGEST_REST,
    MOST_CREDIT,
    TENANTS,
    Asked,
    Candidate,
    Record,
    Typical,
)
from hasten.methods.drafters.auto_experience import Outcome


def test_hope_sinks_to_what_was_seen():
    record = Record(Outcome(4.0, 1.0, 8.0), weight=2.0)
    assert record.gain > 4.0
    hopes = []
    for _ in range(40):
        record.note(1.0)
        hopes.append(record.gain)
    assert hopes == sorted(hopes, reverse=True)
    assert hopes[-1] == pytest.approx(1.2, abs=0.15)
    record.settle(0.3)
    assert record.outcome is not None and record.outcome.gain == pytest.approx(1.0)
    assert record.outcome.profit == pytest.approx(0.3 / record.asks)


def test_trust_starts_as_expected_and_follows_the_record():
    record = Record(Outcome(4.0, 0.7, 8.0), weight=1.0)
    assert record.trust == pytest.approx(0.7)
    record.promised, record.accepted = 30.0, 45.0
    assert record.trust == pytest.approx(46.4 / 32)
    assert Record(Outcome(4.0, 0.1, 8.0), weight=1.0).trust == LEAST_START
    assert Record(Outcome(1.0, 1.0, 8.0), 1.0, promised=1000.0).trust == pytest.approx(0.05)


def test_rest_grows_with_losses_up_to_a_limit():
    record = Record(Outcome(1.0, 1.0, 8.0), weight=1.0)
    rests = []
    for _ in range(20):
        record.settle(-0.1)
        rests.append(record.rest)
    allowed = rests.count(0)
    assert 3 <= allowed <= CREDIT / 0.1
    assert rests == sorted(rests) and rests[allowed] == 1 and rests[-1] == LONGEST_REST
    # One good draft is enough to be asked on.
    record.settle(1.0)
    assert record.rest == record.losses == 0


def test_losses_among_gains_are_no_reason_to_rest():
    record = Record(Outcome(1.0, 1.0, 8.0), weight=1.0)
    for turn in range(200):
        record.settle(0.9 if turn % 6 == 0 else -0.1)
        assert record.rest == 0


def test_credit_follows_what_alike_requests_showed():
    def credit(profit: float) -> float:
        return Record(Outcome(1.0, 1.0, 8.0, profit), weight=1.0).balance

    assert credit(0.0) == CREDIT and credit(0.1) == pytest.approx(CREDIT + 0.1 * HOPE)
    assert (credit(-1.0), credit(3.0)) == (LEAST_CREDIT, MOST_CREDIT)


def test_no_draft_no_outcome():
    assert Record(Outcome(1.0, 1.0, 8.0), weight=1.0).outcome is None


def test_typical_values_leave_out_the_first_call_and_hiccups():
    seconds = Typical()
    for value in (50.0, 1.0, 1.0, 1.1, 900.0, 1.0):
        seconds.add(value)
    assert seconds.value == pytest.approx(1.05)
    for _ in range(LATEST):
        seconds.add(7.0)
    assert seconds.value == 7.0


def test_typical_values_may_start_somewhere():
    extra = Typical([0.0] * 7)
    for _ in range(6):
        extra.add(3.0)
    assert extra.value == 0.0
    for _ in range(3):
        extra.add(3.0)
    assert extra.value == 3.0


def test_lessons_are_a_tenants_own_and_bounded():
    candidate = Candidate()
    candidate.learned("one").verified(40)
    assert candidate.learned("one").size > candidate.learned("two").size
    for number in range(TENANTS - 1):
        candidate.learned(str(number))
    assert len(candidate.lessons) == TENANTS and "one" not in candidate.lessons and "two" in candidate.lessons


def test_a_draft_gains_what_pays_of_it():
    """Nodes that are right but not worth their rows are nothing that a drafter is asked again for."""
    draft = Draft([5, 6, 7], [-1, 0, 1])
    request: Any = SimpleNamespace(id=3, params=SimpleNamespace(tenant=""))
    gains = []
    for nodes in ([], [0], [0, 1]):
        candidate = Candidate()
        candidate.records[3] = Record(Outcome(3.0, 1.0, 8.0), weight=1.0)
        candidate.learn(request, Asked(draft, [0.9, 0.9, 0.9], nodes, 0.0), [5, 6, 7, 8], cost=0.1)
        gains.append(candidate.records[3].gained)
        assert candidate.records[3].accepted == 3
    assert gains == [0, 1, 2]
