"""Ctrl-C and SIGTERM while something runs that must not be left halfway."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def between_steps() -> Iterator[Callable[[], int]]:
    """Let Ctrl-C and SIGTERM wait for the end of the step: half an update must not be saved. Yields which came, or 0.

    A second Ctrl-C does not wait. A second SIGTERM does: `timeout`, for one, sends two.
    """
    asked = 0

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = asked or number

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
