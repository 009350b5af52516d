"""Where messages of `hasten chat` come from: who sits at a terminal, or whatever is standard input."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hasten.errors import Interrupted, UserError

BLOCK = '"""'
"""What stands around a message of several lines."""


@contextmanager
def stopping(interactive: bool) -> Iterator[Callable[[], bool]]:
    """Where somebody sits there, Ctrl-C asks the answer inside to stop after its step, and the second one stops it now.

    Yields:
        Whether it was asked.
    """
    if not interactive or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        signal.signal(signal.SIGINT, before)
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    except Interrupted:
        raise
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, before)


def lines() -> Iterator[str]:
    """Messages of who does not sit at a terminal."""
    try:
        for line in sys.stdin or ():
            yield line.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is no text in UTF-8: {error}") from error


def typed() -> Iterator[str]:
    """Messages that are typed, with the line editing and the history of the terminal."""
    import readline  # noqa: F401  # `input` uses it once it is there

    while True:
        try:
            with _heard():
                message = _message()
            yield message
        except EOFError:
            print()
            return
        except Interrupted:
            raise
        except KeyboardInterrupt:
            # What was typed is not meant.
            print()


@contextmanager
def _heard() -> Iterator[None]:
    """Signals that come between the prompt and the wait for a key are answered within half a second.

    The line editor looks for them before it prints the prompt, and then not until something interrupts its wait.
    """
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _message() -> str:
    """One message: a line, with those behind a backslash, or a block."""
    message = input(">>> ")
    if message.startswith(BLOCK):
        message = message.removeprefix(BLOCK)
        while not message.endswith(BLOCK):
            message += "\n" + input("... ")
        return message.removesuffix(BLOCK)
    while message.endswith("\\"):
        message = message[:-1] + "\n" + input("... ")
    return message
