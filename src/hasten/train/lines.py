"""Files of JSON lines that long runs go on writing: the first line says what the others depend on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hasten.errors import UserError
from hasten.train.settings import differences


def lines_of(documents: Iterable[Mapping[str, Any]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(document) + "\n" for document in documents)


def read_lines(file: Path, origin: Mapping[str, Any] | None, needed: Mapping[str, type]) -> list[dict[str, Any]]:
    """All lines behind the first, none where there is no file; one that was cut off by a kill does not count.

    Args:
        origin: what the first line must be. None: anything, but there must be a file.
        needed: what every other line has, and of which kind.

    Raises:
        UserError: the file has another origin, or is damaged.
    """
    try:
        content = file.read_bytes() if origin is None or file.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        given, *lines = [dict(json.loads(line)) for line in whole.splitlines()] or [dict(origin or {})]
        if not all(isinstance(line.get(name), kind) for line in lines for name, kind in needed.items()):
            raise ValueError("something is missing")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"cannot read {file}: it is damaged, or no file of this kind") from error
    if origin is not None and (changed := differences(given, origin)):
        raise UserError(f"what stands in {file} was made with another {changed}")
    return lines
