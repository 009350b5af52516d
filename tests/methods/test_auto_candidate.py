"""The records that `auto` keeps of drafters."""

from __future__ import annotations

import pytest

from hasten.methods.drafters.auto_candidate import (
    LATEST,
    LEAST_START,
    LONGEST_REST,
    PATIENCE,
    TENANTS,
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
    assert record.outcome is not None and record.outcome.gain == pytest.approx(1.0)


def test_trust_starts_as_expected_and_follows_the_record():
    record = Record(Outcome(4.0, 0.7, 8.0), weight=1.0)
    assert record.trust == pytest.approx(0.7)
    record.promised, record.accepted = 30.0, 45.0
    assert record.trust == pytest.approx(46.4 / 32)
    assert Record(Outcome(4.0, 0.1, 8.0), weight=1.0).trust == LEAST_START
    assert Record(Outcome(1.0, 1.0, 8.0), 1.0, promised=1000.0).trust == pytest.approx(0.05)


def test_rest_grows_with_misses_up_to_a_limit():
    record = Record(Outcome(1.0, 1.0, 8.0), weight=1.0)
    rests = []
    for _ in range(PATIENCE + 8):
        record.missed()
        rests.append(record.rest)
    assert rests[:PATIENCE] == [0] * PATIENCE
    assert rests == sorted(rests) and rests[-1] == LONGEST_REST


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
