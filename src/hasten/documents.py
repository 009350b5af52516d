"""JSON that every reader takes: a figure that does not exist (NaN, infinity) is null."""

from __future__ import annotations

import json
from math import isfinite
from typing import Any


def dumps(document: Any, **options: Any) -> str:
    """As `json.dumps`; floats that are not finite become null, as the standard has no name for them."""
    return json.dumps(_figures(document), allow_nan=False, **options)


def _figures(value: Any) -> Any:
    """The same document, without such floats."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: _figures(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_figures(each) for each in value]
    return value
