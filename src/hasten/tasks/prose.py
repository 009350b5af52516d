"""Source and documentation of Python's standard library: natural text that every machine already has."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from .base import Split, split_of

SKIPPED = {
    "test", "tests", "site-packages", "dist-packages", "lib2to3", "idlelib", "turtledemo", "encodings",
    "pydoc_data", "__pycache__", "_pyrepl",
}  # fmt: skip


def prose_documents(split: Split) -> Iterator[str]:
    """The files of one split, in the order of their paths. A file belongs to one split as a whole."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED.intersection(relative.parts) or split_of(relative.as_posix()) != split:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if not is_data(text):
            yield text


def is_data(text: str) -> bool:
    """Whether a file is empty or mostly tables: many lines with fewer letters than other signs."""
    lines = [line for line in ("".join(line.split()) for line in text.splitlines()) if len(line) > 1]
    data = sum(2 * sum(map(str.isalpha, line)) < len(line) or len(line) > 200 for line in lines)
    return 4 * data >= len(lines)


def prose_chunks(split: Split, characters: int = 2000) -> Iterator[str]:
    """The same text in pieces of about so many characters. Only a longer single line exceeds them."""
    for document in prose_documents(split):
        piece = ""
        for line in document.splitlines(keepends=True):
            if piece and len(piece) + len(line) > characters:
                yield piece
                piece = ""
            piece += line
        if piece.strip():
            yield piece
