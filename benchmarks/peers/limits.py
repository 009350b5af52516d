"""A limit of time for a command: when it passes, the process ends, and with it all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """A process that leads a group of its own; text in and out."""
    return subprocess.Popen(command, text=True, start_new_session=True, **options)


def send(process: subprocess.Popen[str], number: int) -> None:
    """A signal to the process and its children. Until it is waited for, its number is nobody else's."""
    if process.returncode is None:
        os.killpg(process.pid, number)


@contextmanager
def limit(process: subprocess.Popen[str], seconds: float) -> Iterator[threading.Event]:
    """Kill the group if the block takes longer; the event says whether that happened."""
    passed = threading.Event()

    def end() -> None:
        passed.set()
        send(process, signal.SIGKILL)

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        yield passed
    finally:
        timer.cancel()


def output(command: Sequence[str], seconds: float, **options: Any) -> str:
    """What a command prints. An interrupted one is ended.

    Raises:
        TimeoutError: it takes longer.
    """
    process = start(command, stdout=subprocess.PIPE, **options)
    try:
        with limit(process, seconds) as passed:
            printed, _ = process.communicate()
    finally:
        send(process, signal.SIGKILL)
    if passed.is_set():
        raise TimeoutError(f"took longer than {seconds:g} s")
    return printed
