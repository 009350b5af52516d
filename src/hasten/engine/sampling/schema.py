"""What a JSON schema asks that a grammar cannot hold to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

VALUES = ("const", "enum", "default", "examples")
"""Keywords whose values are JSON, no schemas."""
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose values are schemas by names of a user's own."""


def refuse_repetition(schema: str) -> None:
    """Refuse to count keys of free names: a grammar does not know which were there, and one key twice is one property.

    Raises:
        ValueError: a schema, or one in it, that asks for more than one of them.
    """
    for each in _schemas(json.loads(schema)):
        least, required = each.get("minProperties"), each.get("required")
        named = len(required) if isinstance(required, list) else 0
        if isinstance(least, int | float) and least - named > 1:
            raise ValueError(
                f"minProperties {least} counts keys of free names, and one of them may come twice; "
                "name the keys in properties and required"
            )


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and all that are in it."""
    if isinstance(schema, list):
        for each in schema:
            yield from _schemas(each)
    elif isinstance(schema, dict):
        yield schema
        for keyword, value in schema.items():
            if keyword in NAMED and isinstance(value, dict):
                yield from _schemas(list(value.values()))
            elif keyword not in VALUES:
                yield from _schemas(value)
