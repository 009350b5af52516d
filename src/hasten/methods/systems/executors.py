"""Where the drafter of Mirror-SD computes: in a process of its own, on cores of its own, or in this thread.

`Process` and `Inline` do the same; only when they do it differs. What is `asked` is waited for; what is `told` is not.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from threading import RLock
from typing import Any, NoReturn, Protocol
from weakref import finalize

import hasten
from hasten.errors import UserError
from hasten.methods.drafters.small_model import SmallCheckpoint
from hasten.methods.systems.rollouts import Rollouts
from hasten.methods.systems.streams import MOST

WORKER = "hasten.methods.systems.worker"
PATIENCE = 5.0
"""Seconds that a process is given to end by itself."""


@dataclass(frozen=True)
class Setup:
    """What the drafter's process is made of: see `Rollouts`.

    Attributes:
        cores: numbers of those that it computes on.
        pinned: whether the system is to keep it there.
        streams: of the small model, at most.
    """

    checkpoint: SmallCheckpoint
    target: Path
    end_ids: frozenset[int]
    length: int
    confidence: float
    width: int
    cores: tuple[int, ...]
    pinned: bool
    streams: int = MOST

    def rollouts(self) -> Rollouts:
        """Loads the model.

        Raises:
            UserError: a checkpoint that cannot be loaded.
        """
        sizes = self.length, self.confidence, self.width, self.streams
        return Rollouts(self.checkpoint, self.target, self.end_ids, *sizes)


class Executor(Protocol):
    """Calls methods of `Rollouts` by name, in order.

    Attributes:
        generation: of the drafter that is called, 0 where there is none; a later one knows nothing of what an earlier
            one was told.
    """

    generation: int

    def start(self) -> None:
        """Have it ready; harmless if it is.

        Raises:
            UserError: the model cannot be loaded.
        """

    def ask(self, name: str, *arguments: Any) -> Any:
        """What the method returns.

        Raises:
            UserError: what it raises; or its process has ended.
        """

    def tell(self, name: str, *arguments: Any) -> None:
        """Call a method that returns nothing, at the latest before the next one that is asked."""

    @property
    def rollouts(self) -> Rollouts | None:
        """Where it is part of this process."""


class Inline:
    """In the thread that asks. Chains that no verdict has asked for are left out: they would cost, and hide nothing."""

    generation = 1

    def __init__(self, rollouts: Rollouts) -> None:
        self._rollouts = rollouts

    @property
    def rollouts(self) -> Rollouts | None:
        return self._rollouts

    def start(self) -> None:
        pass

    def ask(self, name: str, *arguments: Any) -> Any:
        return getattr(self._rollouts, name)(*arguments)

    def tell(self, name: str, *arguments: Any) -> None:
        getattr(self._rollouts, name)(*arguments)


class Process:
    """In a process that ends with this object, or with the process that made it, however that ends.

    Any thread may call, one at a time.

    Attributes:
        pid: of the process; 0 before it has started.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup, self._lock = setup, RLock()
        self._pipe: Connection | None = None
        self._end, self._started = _nothing, 0
        self.generation = self.pid = 0

    @property
    def rollouts(self) -> Rollouts | None:
        return None

    def start(self) -> None:
        with self._lock:
            if self._pipe is not None:
                return
            ours, theirs = socket.socketpair()
            with theirs:
                command = [sys.executable, "-m", WORKER, str(theirs.fileno())]
                process = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=_environment(),
                    # Ctrl-C is for the process that decodes, which ends this one.
                    start_new_session=True,
                )
            self._pipe = Connection(ours.detach())
            self._end = finalize(self, _stop, self._pipe, process, os.getpid())
            self.pid = process.pid
            try:
                self._pipe.send(self._setup)
                self._receive()
            except BaseException:
                self._leave()
                raise
            self._started += 1
            self.generation = self._started

    def ask(self, name: str, *arguments: Any) -> Any:
        with self._lock:
            self._send(name, arguments, True)
            return self._receive()

    def tell(self, name: str, *arguments: Any) -> None:
        with self._lock:
            self._send(name, arguments, False)

    def _send(self, name: str, arguments: tuple[Any, ...], answers: bool) -> None:
        if self._pipe is None:
            raise UserError(_ENDED)
        try:
            self._pipe.send((name, arguments, answers))
        except OSError:
            self._lost()

    def _receive(self) -> Any:
        assert self._pipe is not None
        try:
            sound, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._lost()
        if not sound:
            raise UserError(answer)
        return answer

    def _lost(self) -> NoReturn:
        self._leave()
        raise UserError(_ENDED)

    def _leave(self) -> None:
        self._pipe, self.generation = None, 0
        self._end()


_ENDED = "mirror-sd: the drafter's process has ended; the next request starts another one"


def _nothing() -> None:
    pass


def _stop(pipe: Connection, process: subprocess.Popen[bytes], owner: int) -> None:
    """The end of the pipe tells it to go home."""
    if os.getpid() != owner:
        # A fork has copies of what it does not own.
        return
    pipe.close()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _environment() -> dict[str, str]:
    """Of this process, with this hasten."""
    paths = [str(Path(hasten.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
