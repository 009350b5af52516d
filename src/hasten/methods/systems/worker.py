"""The drafter's process of Mirror-SD: `python -m hasten.methods.systems.worker SOCKET`, started by `executors.py`."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection

import torch

from hasten.errors import UserError, one_line
from hasten.methods.systems.executors import PATIENCE, Setup
from hasten.methods.systems.rollouts import Rollouts


def pin(cores: tuple[int, ...]) -> None:
    """Stay on these cores, where the system allows that."""
    with suppress(AttributeError, OSError):
        os.sched_setaffinity(0, cores)


def serve(pipe: Connection, rollouts: Rollouts) -> None:
    """Do what is said, and roll out while nothing is, until the pipe ends or the other process does."""
    failure: str | None = None
    owner = os.getppid()
    while True:
        try:
            rollouts.ahead()
            while failure is None and not pipe.poll() and rollouts.round():
                pass
        except Exception as error:
            failure = _told(error)
        while not pipe.poll(PATIENCE):
            if os.getppid() != owner:
                return
        name, arguments, answers = pipe.recv()
        result = None
        try:
            if failure is None:
                result = getattr(rollouts, name)(*arguments)
        except Exception as error:
            failure = _told(error)
        if not answers:
            continue
        pipe.send((failure is None, result if failure is None else failure))
        failure = None


def _told(error: Exception) -> str:
    """For whoever asks next."""
    if not isinstance(error, UserError):
        traceback.print_exception(error)
    return f"the drafter's process failed: {one_line(error)}"


def main() -> None:
    """The process: set up by what comes first through the pipe that its argument names, it serves until that breaks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = Connection(int(sys.argv[1]))
    # Where the pipe breaks, nobody is there any more.
    with suppress(EOFError, OSError):
        setup: Setup = pipe.recv()
        if setup.pinned:
            pin(setup.cores)
        torch.set_num_threads(len(setup.cores))
        try:
            rollouts = setup.rollouts()
        except UserError as error:
            pipe.send((False, str(error)))
            return
        pipe.send((True, None))
        serve(pipe, rollouts)


if __name__ == "__main__":
    main()
