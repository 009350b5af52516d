"""Turns come in order, calls for later are made, and one thread drives for all that wait."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hasten.engine.turn import Driver, Turn


def test_a_thread_that_takes_turn_after_turn_keeps_nobody_waiting():
    """The others are through before the busy one has had a handful more turns, where a lock gives it hundreds."""
    turn, over = Turn(), threading.Event()
    turns = 0

    def busy() -> None:
        nonlocal turns
        while not over.is_set():
            with turn:
                turns += 1
                time.sleep(0.0002)

    def visit() -> int:
        before = turns
        with turn:
            return turns - before

    with ThreadPoolExecutor(5) as pool:
        pool.submit(busy)
        try:
            waits = [waited for _ in range(20) for waited in pool.map(lambda _: visit(), range(4))]
        finally:
            over.set()
    # A machine that is busy itself may keep a few of them from running.
    assert sorted(waits)[len(waits) // 2] < 20


def test_what_is_called_for_later_waits_for_the_end_of_the_turn():
    turn, called = Turn(), []
    turn.later(lambda: called.append("at once"))
    assert called == ["at once"]
    with turn:
        turn.later(lambda: called.append("first"))
        # As the garbage collector may, from within.
        turn.later(lambda: turn.later(lambda: called.append("second")))
        assert called == ["at once"]
    assert called == ["at once", "first", "second"]


def test_no_call_is_lost_or_made_twice():
    turn, called = Turn(), []

    def work(number: int) -> None:
        for count in range(200):
            turn.later(lambda mark=(number, count): called.append(mark))
            with turn:
                gc.collect(0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert sorted(called) == [(number, count) for number in range(4) for count in range(200)]


def test_one_thread_drives_for_all():
    """Nobody steps beside another, nobody sleeps on when he has what he waits for, nobody steps further than that."""
    count, inside, reached = 0, 0, {}

    def step() -> None:
        nonlocal count, inside
        inside += 1
        assert inside == 1
        time.sleep(0.0001)
        count += 1
        inside -= 1

    driver = Driver(step)

    def wait(goal: int) -> None:
        driver.until(lambda: count >= goal)
        reached[goal] = count

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(wait, [300, 5, 40, 41, 42, 250, 7, 120, 121, 299, 1, 60]))
    assert count == 300
    assert all(goal <= at for goal, at in reached.items())


def test_who_is_interrupted_hands_on():
    """A step that raises ends the waiting of the thread that took it; the others go on."""
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        time.sleep(0.001)
        if count == 10:
            raise KeyboardInterrupt

    driver, outcomes = Driver(step), []

    def wait(goal: int) -> None:
        try:
            driver.until(lambda: count >= goal)
            outcomes.append(goal)
        except KeyboardInterrupt:
            outcomes.append("interrupted")

    threads = [threading.Thread(target=wait, args=(goal,)) for goal in (30, 31, 32, 33)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert outcomes.count("interrupted") == 1
    assert len(outcomes) == 4
    with pytest.raises(ZeroDivisionError):
        Driver(lambda: 1 / 0).until(lambda: False)
