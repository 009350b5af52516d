"""GBNF as llama.cpp reads it, in the part of it that llguidance's conversion understands."""

from __future__ import annotations

import re

_PARTS = re.compile(
    r"""(?P<comment>\#[^\r\n]*) | "(?P<literal>(?:\\.|[^"\\])*)" | \[(?P<set>(?:\\.|[^\]\\])*)\] | (?P<most>\{\s*,)
    | (?P<any>\.)""",
    re.VERBOSE | re.DOTALL,
)
_CHARACTERS = re.compile(
    r"\\x(?P<x>[0-9a-fA-F]{2}) | \\u(?P<u>[0-9a-fA-F]{4}) | \\U(?P<U>[0-9a-fA-F]{8}) | \\(?P<named>.) | (?P<plain>.)",
    re.VERBOSE | re.DOTALL,
)
_NAMED = {"n": "\n", "r": "\r", "t": "\t", **{character: character for character in '"\\[]-^'}}
ANY = "[\\x00-\U0010ffff]"
"""What a dot is in GBNF: line breaks, too."""
_MEANING = '"\\[]^-/'
"""Characters that mean something in a literal or a set of Lark."""


def decoded(grammar: str) -> str:
    r"""A grammar whose escapes are characters (of those that mean something, and of controls, two digits stay: `\x22`).

    The conversion loses the zeros that a code point begins with, and `{,3}` it does not know.

    Raises:
        ValueError: an escape that is none, or of what is no character.
    """
    return _PARTS.sub(_part, grammar)


def _part(match: re.Match[str]) -> str:
    if match["literal"] is not None:
        return '"' + _CHARACTERS.sub(_character, match["literal"]) + '"'
    if match["set"] is not None:
        inverse, inside = match["set"].startswith("^"), match["set"].removeprefix("^")
        return "[" + "^" * inverse + _CHARACTERS.sub(_character, inside) + "]"
    return match[0] if match["comment"] is not None else "{0," if match["most"] is not None else ANY


def _character(match: re.Match[str]) -> str:
    if match["plain"] is not None:
        # Whatever means something here was meant, but for what is no part of GBNF's own syntax.
        return match[0] if match[0].isprintable() and match[0] != "/" else _written(match[0])
    digits = match["x"] or match["u"] or match["U"]
    if digits is None:
        if match["named"] not in _NAMED:
            raise ValueError(f"GBNF has no escape {match[0]}")
        return _written(_NAMED[match["named"]])
    number = int(digits, 16)
    if number > 0x10FFFF or 0xD800 <= number < 0xE000:
        raise ValueError(f"{match[0]} is no character")
    return _written(chr(number))


def _written(character: str) -> str:
    """As both a literal and a set may hold it."""
    plain = ord(character) >= 0x80 or (character.isprintable() and character not in _MEANING)
    return character if plain else f"\\x{ord(character):02x}"
