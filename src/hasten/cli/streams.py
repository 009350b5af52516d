"""Standard streams as commands meet them: closed, full, without UTF-8."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from hasten.errors import UserError

STOPS = (signal.SIGINT, signal.SIGTERM)
UNWRITTEN = "cannot write to standard output"


class Unread(Exception):
    """Nobody reads standard output any more: whoever did has enough.

    No `BrokenPipeError`, which libraries take for a failure.
    """


@contextmanager
def usable() -> Iterator[None]:
    """Inside, standard output takes every character, and says in one sentence what it does not take; so does stderr.

    Characters that an encoding lacks are replaced. What was closed before the program began is nowhere (stderr), or
    refuses what is written (stdout).
    """
    out, err = sys.stdout, sys.stderr
    if err is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the program ends
    sys.stdout = _Output(out)
    try:
        yield
    finally:
        sys.stdout = out


class _Output:
    """A stream whose failures to write are told in one sentence; a pipe that nobody reads any more is `Unread`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if text == "":
            # So libraries ask what kind of stream this is, and swallow the answer.
            return 0
        if self._stream is None:
            raise UserError(f"{UNWRITTEN}: it is closed")
        with _told(self._stream):
            return int(self._stream.write(text))

    def flush(self) -> None:
        if self._stream is not None:
            with _told(self._stream):
                self._stream.flush()

    def isatty(self) -> bool:
        return self._stream is not None and bool(self._stream.isatty())

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"


@contextmanager
def _told(stream: Any) -> Iterator[None]:
    """What the system refuses to write is said; nothing is written at the end of the program then."""
    try:
        yield
    except OSError as error:
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        if isinstance(error, BrokenPipeError):
            raise Unread from error
        raise UserError(f"{UNWRITTEN}: {error.strerror or error}") from error


def takes_all_characters() -> bool:
    """Whether standard output's encoding has every character."""
    return (sys.stdout.encoding or "utf-8").lower().replace("-", "").startswith("utf")


def standard_input() -> str:
    """All of standard input, in UTF-8 whatever the locale.

    Raises:
        UserError: it is closed, or no UTF-8 text.
    """
    if sys.stdin is None:
        raise UserError("cannot read standard input: it is closed")
    try:
        raw = getattr(sys.stdin, "buffer", None)
        return sys.stdin.read() if raw is None else raw.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is no UTF-8 text: byte {error.start + 1} is none") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read standard input: {getattr(error, 'strerror', None) or error}") from error


def argument(name: str, given: str) -> str:
    """An argument's text, in UTF-8 whatever the locale.

    Raises:
        UserError: it is no UTF-8 text.
    """
    try:
        return os.fsencode(given).decode() if not given.isascii() else given
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is no UTF-8 text: byte {error.start + 1} is none") from None
    except UnicodeEncodeError:
        # Not from the command line: text as it is.
        return given


@contextmanager
def uninterrupted() -> Iterator[None]:
    """What stands inside is done whole: Ctrl-C and SIGTERM come behind it.

    By handlers, not by a mask: another thread of the process would take a masked signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {each: signal.signal(each, lambda number, frame: came.append(number)) for each in STOPS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        for number in came[:1]:
            signal.raise_signal(number)
