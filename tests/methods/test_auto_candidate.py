"""The records that `auto` keeps of drafters."""

from __future__ import annotations

import pytest

from hasten.methods.drafters.auto_candidate import LONGEST_REST, PATIENCE, Mean, Record
from hasten.methods.drafters.auto_experience import Outcome


def test_hope_sinks_to_what_was_seen():
    record = Record(Outcome(4.0, 1.0), weight=2.0)
    assert record.gain > 4.0
    hopes = []
    for _ in range(40):
        record.note(1.0)
        hopes.append(record.gain)
    assert hopes == sorted(hopes, reverse=True)
    assert hopes[-1] == pytest.approx(1.2, abs=0.15)
    assert record.outcome is not None and record.outcome.gain == pytest.approx(1.0)


def test_trust_starts_as_expected_and_follows_the_record():
    record = Record(Outcome(4.0, 0.5), weight=1.0)
    assert record.trust == pytest.approx(0.5)
    record.promised, record.accepted = 30.0, 45.0
    assert record.trust == pytest.approx(46 / 32)
    assert Record(Outcome(1.0, 1.0), 1.0, promised=1000.0).trust == pytest.approx(0.05)


def test_rest_grows_with_misses_up_to_a_limit():
    record = Record(Outcome(1.0, 1.0), weight=1.0)
    rests = []
    for _ in range(PATIENCE + 8):
        record.missed()
        rests.append(record.rest)
    assert rests[:PATIENCE] == [0] * PATIENCE
    assert rests == sorted(rests) and rests[-1] == LONGEST_REST


def test_no_draft_no_outcome():
    assert Record(Outcome(1.0, 1.0), weight=1.0).outcome is None


def test_a_mean_starts_exact_and_fades():
    mean = Mean()
    for value in (1.0, 2.0, 6.0):
        mean.add(value)
    assert mean.value == pytest.approx(3.0)
    for _ in range(200):
        mean.add(10.0)
    assert mean.value == pytest.approx(10.0, abs=0.01)
