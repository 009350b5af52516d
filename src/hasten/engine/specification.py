"""How methods are written: `slug:key=value,key=value`, with `[...]` around a value that has separators of its own."""

from __future__ import annotations

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
