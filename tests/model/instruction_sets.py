"""The native step in one instruction set after the other, within a process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hasten.errors import UserError
from hasten.model.native import library
from hasten.model.native.library import INSTRUCTION_SETS

__all__ = ["INSTRUCTION_SETS", "chosen"]


@contextmanager
def chosen(name: str, built: Path, folder: Path) -> Iterator[bool]:
    """The native backend runs in an instruction set; yields whether this machine has it.

    A library chooses once, when it is first asked: each set has a copy of its own.

    Args:
        built: the library.
        folder: where the copy is put.
    """
    before = library.LIBRARY, os.environ.get("HASTEN_NATIVE")
    copy = folder / f"{name}.so"
    shutil.copy(built, copy)
    try:
        _use(copy, name)
        yield _available()
    finally:
        _use(*before)


def _available() -> bool:
    try:
        return library.library() is not None
    except UserError:
        return False


def _use(path: Path, name: str | None) -> None:
    """Load another library."""
    library.LIBRARY = path
    library.library.cache_clear()
    os.environ.pop("HASTEN_NATIVE", None)
    if name is not None:
        os.environ["HASTEN_NATIVE"] = name
