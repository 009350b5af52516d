"""How methods are written: `slug:key=value,key=value`, with `[...]` around a value that has separators of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from functools import cache
from math import isfinite
from typing import Any, cast, get_type_hints

from hasten.errors import UserError


def pieces(text: str, separator: str) -> list[str]:
    """A text cut at a separator, wherever no bracket is open.

    Raises:
        UserError: a bracket that is not closed, or never was opened.
    """
    found, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if depth < 0:
            break
        if character == separator and depth == 0:
            found.append(text[start:place])
            start = place + 1
    if depth:
        raise UserError(f"{text!r} has {'more' if depth > 0 else 'fewer'} opening brackets than closing ones")
    return [*found, text[start:]]


def bare(value: str) -> str:
    """A value without the brackets around it."""
    value = value.strip()
    return value[1:-1] if value.startswith("[") and value.endswith("]") else value


def split_methods(text: str) -> list[str]:
    """`a,b:x=1,y=2` to `["a", "b:x=1,y=2"]`: a comma starts a new method unless `key=value` follows it.

    Raises:
        UserError: no method, or brackets that do not match.
    """
    names: list[str] = []
    for piece in filter(None, map(str.strip, pieces(text, ","))):
        key = piece.partition("=")[0]
        if names and "=" in piece and ":" not in key:
            names[-1] += f",{piece}"
        else:
            names.append(piece)
    if not names:
        raise UserError("give at least one method")
    return names


def values(slug: str, parameters: type[Any], text: str) -> dict[str, Any]:
    """`key=value,key=value` to values of the types of a dataclass's fields.

    Args:
        slug: of the method, for messages.

    Raises:
        UserError: an unknown key, a key without a value, or a value of the wrong type.
    """
    types, found = _types(cast(Hashable, parameters)), {}
    for item in filter(None, pieces(text, ",")):
        key, equals, value = item.partition("=")
        key = key.strip().replace("-", "_")
        require_parameter(slug, parameters, key)
        if not equals:
            raise UserError(f"{slug}: {key} needs a value: {key}=...")
        found[key] = _convert(slug, key, bare(value), types[key])
    return found


@cache
def _types(parameters: Hashable) -> dict[str, Any]:
    """Of a dataclass's fields: each is compiled, and a knob is turned many times while methods register."""
    return get_type_hints(parameters)


def require_parameter(slug: str, parameters: type[Any], name: str) -> None:
    """Refuse what is no field of a method's dataclass.

    Raises:
        UserError: it is none.
    """
    names = [field.name for field in dataclasses.fields(parameters)]
    if name not in names:
        raise UserError(f"{slug} has no parameter {name!r}; its parameters are: {', '.join(names) or 'none'}")


def _convert(slug: str, key: str, text: str, kind: Any) -> Any:
    """Text as the field's type."""
    if kind is bool:
        if text.lower() in ("true", "1", "yes", "on"):
            return True
        if text.lower() in ("false", "0", "no", "off"):
            return False
        raise UserError(f"{slug}: {key} must be true or false, not {text!r}")
    if kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise UserError(f"{slug}: {key} must be {wanted}, not {text!r}") from None
        if not isfinite(number):
            raise UserError(f"{slug}: {key} must be a finite number, not {text!r}")
        return number
    return text
