"""What is told in one sentence: bad input, with the check that finds it, an interruption, and a notice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from math import isfinite
from typing import Any


class UserError(Exception):
    """Bad input, told in one clear sentence: the command line prints it and exits with status 2."""


class Notice(UserWarning):
    """What a user should know and need not act on, in one clear sentence: the command line prints it."""


class Interrupted(KeyboardInterrupt):
    """A signal asked to end: the command line tells what became of the work, and exits as a shell expects.

    Args:
        sentence: for the user.
        number: the signal's; the exit status is 128 and this.
    """

    def __init__(self, sentence: str, number: int) -> None:
        super().__init__(sentence)
        self.number = number


def one_line(error: Exception) -> str:
    """An error's message, as the end of a sentence."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def require(checks: Iterable[tuple[bool, str]], subject: str = "") -> None:
    """Refuse what does not hold.

    Args:
        checks: what must hold, and the sentence for when it does not; the first that fails is told.
        subject: whose parameters they are, put before the sentence.

    Raises:
        UserError: a check fails.
    """
    for holds, sentence in checks:
        if not holds:
            raise UserError(f"{subject}: {sentence}" if subject else sentence)


def require_finite(parameters: Any, subject: str = "") -> None:
    """Refuse NaN and infinity among the numbers of a dataclass.

    Args:
        parameters: the object.
        subject: as in `require`.

    Raises:
        UserError: a field is a float, but no finite number.
    """
    numbers = {field.name: getattr(parameters, field.name) for field in fields(parameters)}
    require(
        (
            (not isinstance(value, float) or isfinite(value), f"{name} must be a finite number, not {value}")
            for name, value in numbers.items()
        ),
        subject,
    )
