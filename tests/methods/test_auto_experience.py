"""What `auto` expects of a new prompt from those before it."""

from __future__ import annotations

import pytest

from hasten.methods.drafters.auto_experience import (
    LEAST_WEIGHT,
    MOST_WEIGHT,
    REMEMBERED,
    UNKNOWN,
    Experience,
    Outcome,
)

GOOD, BAD = Outcome(4.0, 1.0, 20.0), Outcome(0.5, 0.2, 2.0)
SUMS, TALES = list(range(10)), list(range(50, 90))


def test_nothing_is_known_at_first():
    expected = Experience(2).expect("", [1, 2, 3])
    assert expected.outcomes == (UNKNOWN, UNKNOWN)
    assert expected.weight == LEAST_WEIGHT


def test_alike_prompts_count_most():
    experience = Experience(1)
    for turn in range(6):
        experience.remember("", [*SUMS, 100 + turn], [GOOD])
        experience.remember("", [*TALES, 100 + turn], [BAD])
    sums, tales = experience.expect("", [*SUMS, 999]), experience.expect("", [*TALES, 999])
    assert sums.outcomes[0].gain > 3.9 and sums.outcomes[0].asks > 19
    assert tales.outcomes[0].gain < 0.6 and tales.outcomes[0].trust < 0.25
    assert sums.weight > 0.75 * MOST_WEIGHT


def test_a_strange_prompt_gets_a_mean_of_little_weight():
    experience = Experience(1)
    experience.remember("", SUMS, [GOOD])
    experience.remember("", TALES, [BAD])
    expected = experience.expect("", [777])
    assert expected.outcomes[0].gain == pytest.approx(2.25)
    assert expected.outcomes[0].asks == pytest.approx(11)
    assert expected.weight == LEAST_WEIGHT


def test_who_was_not_asked_stays_unknown():
    experience = Experience(2)
    experience.remember("", SUMS, [GOOD, None])
    assert experience.expect("", SUMS).outcomes == (GOOD, UNKNOWN)


def test_tenants_are_apart():
    experience = Experience(1)
    experience.remember("one", SUMS, [BAD])
    assert experience.expect("two", SUMS).outcomes == (UNKNOWN,)
    assert experience.expect("one", SUMS).outcomes[0].gain == pytest.approx(BAD.gain)


def test_old_requests_are_forgotten():
    experience = Experience(1)
    experience.remember("", SUMS, [BAD])
    for _ in range(REMEMBERED):
        experience.remember("", TALES, [GOOD])
    assert experience.expect("", SUMS).outcomes[0].gain == pytest.approx(GOOD.gain)
