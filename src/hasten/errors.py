"""The one exception a user sees, the check that raises it, and the warning for what is no error."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """Bad input, told in one clear sentence: the command line prints it and exits with status 2."""


class Notice(UserWarning):
    """What a user should know and need not act on, in one clear sentence: the command line prints it."""


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
