"""Files that are there whole or not at all: what another run takes as complete must never be half of it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hasten.errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Write a file, or a folder's files, inside: what the system refuses is told in one sentence.

    Raises:
        UserError: the disk is full, the folder is read-only, or the like.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {path}: {reason}") from error


def _reason(error: BaseException | None) -> str | None:
    """What the system said, where an error is of its making."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        # The libraries that are written in Rust raise exceptions of their own.
        if told := re.search(r"\(os error (\d+)\)", str(error)):
            return os.strerror(int(told[1]))
        # PyTorch's own hides the system's.
        error = error.__context__
    return None


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to, which becomes `file` when all went well; else `file` stays as it was.

    It is `file`'s with `.new` behind it. All that a kill leaves is that, and the next writer writes over it.

    Raises:
        UserError: it cannot be written, or `file` is something else than a file.
    """
    if file.exists() and not file.is_file():
        raise UserError(f"cannot write {file}: it is no file")
    fresh = file.with_name(f"{file.name}.new")
    try:
        with writing(file):
            yield fresh
            os.replace(fresh, file)
    except BaseException:
        with suppress(OSError):
            fresh.unlink()
        raise


def make_folder(folder: Path) -> None:
    """Make a folder if it is not there, with those that it is in.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error


def write_text(file: Path, text: str) -> None:
    """Write a text file, in UTF-8, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    with replacing(file) as fresh:
        # A file's name that is no UTF-8 may stand in a text.
        fresh.write_text(text, encoding="utf-8", errors="replace")


def json_line(file: Path, number: int, line: str) -> Any:
    """What a line of a file of JSON lines says.

    Raises:
        UserError: it is no JSON; the sentence has the file and the line's number.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}, line {number}: not JSON ({error})") from error


def cache_folder(kind: str) -> Path:
    """Where measurements of a kind are kept: below `$HASTEN_CACHE`, by default the user's cache folder."""
    base = os.environ.get("HASTEN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "hasten"
    return Path(base) / kind


def megabytes(count: int) -> str:
    """A number of bytes, for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
