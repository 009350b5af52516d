"""Many threads on one engine: each gets its turn, and whoever waits for tokens takes the steps for all who do."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Lock


class Turn:
    """A lock that a thread which takes it again and again cannot keep to itself.

    It is no `threading.Lock`, since that one goes to whoever asks at the right moment: a thread that takes step after
    step always would.
    """

    def __init__(self) -> None:
        # Who holds `_next` is the only one that waits for `_turn`: the thread that had the turn queues up behind.
        self._turn, self._next = Lock(), Lock()
        self._later: deque[Callable[[], None]] = deque()

    def __enter__(self) -> None:
        with self._next:
            self._turn.acquire()

    def __exit__(self, *raised: object) -> None:
        self._turn.release()
        self._catch_up()

    def later(self, call: Callable[[], None]) -> None:
        """Have something called in a turn of its own: now, or when the thread whose turn it is has ended it.

        Never waits, so the garbage collector may come here in the middle of a turn of the same thread.
        """
        self._later.append(call)
        self._catch_up()

    def _catch_up(self) -> None:
        """Make the calls that wait; if another thread has the turn, it makes them when it comes here."""
        while self._later and self._turn.acquire(blocking=False):
            try:
                while self._later:
                    self._later.popleft()()
            finally:
                self._turn.release()


class Driver:
    """Takes steps until a thread has what it waits for: one thread takes them for all, the others sleep.

    Args:
        step: what brings everybody further.
    """

    def __init__(self, step: Callable[[], object]) -> None:
        self._step = step
        self._lock = Lock()
        self._driving = False
        self._waiting: list[tuple[Callable[[], bool], Lock]] = []

    def until(self, done: Callable[[], bool]) -> None:
        """Return when `done()` is true; it is asked between steps, by any thread.

        Raises:
            whatever a step raises that this thread takes; the others go on.
        """
        while not done():
            drives = False
            try:
                with self._lock:
                    if self._driving:
                        gate = Lock()
                        gate.acquire()
                        self._waiting.append((done, gate))
                    else:
                        self._driving = drives = True
                if drives:
                    self._drive(done)
                else:
                    gate.acquire()
            finally:
                if drives:
                    self._driving = False
                    # One of them drives on, the others wait again.
                    self._wake(lambda entry: True)

    def _drive(self, done: Callable[[], bool]) -> None:
        while not done():
            self._step()
            if self._waiting:
                self._wake(lambda entry: entry[0]())

    def _wake(self, whom: Callable[[tuple[Callable[[], bool], Lock]], bool]) -> None:
        """Threads that wait go on; one that waits no more, after Ctrl-C, is woken for nothing."""
        with self._lock:
            called = [entry for entry in self._waiting if whom(entry)]
            self._waiting = [entry for entry in self._waiting if entry not in called]
        for _, gate in called:
            gate.release()
