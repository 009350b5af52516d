"""What callers give for a parameter: taken for what it plainly means, or refused in one sentence."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from functools import lru_cache
from math import isnan, nan
from typing import Any, cast, get_args, get_type_hints

from hasten.errors import UserError


def take(parameters: Any) -> None:
    """Give the fields of a frozen dataclass the types that they are declared with; None is a field's default.

    A whole number may come as a float or as another library's (NumPy's, a tensor's), a number, too; a list of strings
    may be one of them. A truth value is no number, and text is none.

    Raises:
        UserError: a value is something else; the sentence names the field.
    """
    for field, taken in _fields(cast(Any, type(parameters))):
        given = getattr(parameters, field.name)
        if given is None:
            value = field.default if field.default_factory is MISSING else field.default_factory()
        else:
            value = taken(field.name, given) if taken is not None else given
        object.__setattr__(parameters, field.name, value)


@lru_cache
def _fields(kind: Any) -> list[tuple[Field[Any], Callable[[str, Any], Any] | None]]:
    """Each field of a dataclass, and what takes its values; None where only the class itself can say."""
    hints = get_type_hints(kind)
    return [(field, next(filter(None, map(TAKERS.get, _types(hints[field.name]))), None)) for field in fields(kind)]


def _types(hint: Any) -> tuple[Any, ...]:
    """The type that a hint names, or those it is a union of."""
    return (hint, *(each for each in get_args(hint) if each is not type(None)))


def whole(name: str, given: Any) -> int:
    """A whole number.

    Raises:
        UserError: it is none.
    """
    value = _number(given)
    if isnan(value) or value != value // 1:
        raise UserError(f"{name} must be a whole number, not {shown(given)}")
    return int(value)


def number(name: str, given: Any) -> float:
    """A number, NaN and infinity among them: ranges are for others to check.

    Raises:
        UserError: it is none.
    """
    value = _number(given)
    if isinstance(value, float) and isnan(value) and not isinstance(given, float):
        raise UserError(f"{name} must be a number, not {shown(given)}")
    return value


def _number(given: Any) -> int | float:
    """A number as Python's own; NaN for what is none."""
    if isinstance(given, (bool, str, bytes)) or _axes(given) or str(getattr(given, "dtype", "")) in BOOLS:
        return nan
    if isinstance(given, (int, float)):
        return given
    try:
        return operator.index(given)
    except TypeError:
        pass
    try:
        return float(given)
    except (TypeError, ValueError, OverflowError):
        return nan


def _axes(given: Any) -> int:
    """Of an array; 0 of what is none."""
    axes: int = getattr(given, "ndim", 0)
    return axes


def yes_or_no(name: str, given: Any) -> bool:
    """A truth value.

    Raises:
        UserError: it is none; text and numbers are not taken for one.
    """
    if str(getattr(given, "dtype", "")) in BOOLS and not _axes(given):
        return bool(given)
    if not isinstance(given, bool):
        raise UserError(f"{name} must be True or False, not {shown(given)}")
    return given


def text(name: str, given: Any) -> str:
    """Text.

    Raises:
        UserError: it is none, or holds half of a surrogate pair, which no UTF-8 has.
    """
    if not isinstance(given, str):
        raise UserError(f"{name} must be text, not {shown(given)}")
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is no text: character {error.start + 1} is no Unicode character") from None
    return given


def texts(name: str, given: Any) -> tuple[str, ...]:
    """Several strings, or one.

    Raises:
        UserError: something else.
    """
    if isinstance(given, str):
        return (text(name, given),)
    if isinstance(given, (bytes, bytearray, Mapping)) or not isinstance(given, Iterable):
        raise UserError(f"{name} must be text or a list of texts, not {shown(given)}")
    return tuple(text(name, each) for each in given)


def token_ids(name: str, given: Any) -> tuple[int, ...]:
    """Several token ids.

    Raises:
        UserError: something else.
    """
    if isinstance(given, (str, bytes, bytearray, Mapping)) or not isinstance(given, Iterable):
        raise UserError(f"{name} must be a list of token ids, not {shown(given)}")
    return tuple(whole(f"{name}: a token id", each) for each in given)


def words(name: str, given: Any) -> tuple[str | tuple[int, ...], ...]:
    """Several words, each as text or as token ids.

    Raises:
        UserError: something else.
    """
    if isinstance(given, (str, bytes, bytearray, Mapping)) or not isinstance(given, Iterable):
        raise UserError(f"{name} must be a list of texts or of lists of token ids, not {shown(given)}")
    return tuple(text(name, each) if isinstance(each, str) else token_ids(name, each) for each in given)


def by_token(name: str, given: Any) -> dict[int, float]:
    """Numbers by token id; JSON has ids as text.

    Raises:
        UserError: something else.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"{name} must map token ids to numbers, not be {shown(given)}")
    return {_token_id(name, key): number(f"{name} of token {key!r}", value) for key, value in given.items()}


def _token_id(name: str, key: Any) -> int:
    """An id as a mapping's key."""
    if isinstance(key, str) and key.isascii() and key.isdigit():
        return int(key)
    return whole(f"a token id in {name}", key)


def shown(given: Any) -> str:
    """A value as a part of a sentence: what it is, in a few characters."""
    kind = type(given).__name__
    if not isinstance(given, (bool, int, float, str, bytes, bytearray, type(None))):
        return f"an object of type {kind}"
    said = ascii(given)
    return said if len(said) <= 40 else f"{said[:37]}..."


BOOLS = ("bool", "torch.bool")
TAKERS: dict[Any, Callable[[str, Any], Any]] = {
    int: whole,
    float: number,
    bool: yes_or_no,
    str: text,
    tuple[str, ...]: texts,
    tuple[int, ...]: token_ids,
    tuple[str | tuple[int, ...], ...]: words,
    Mapping[int, float]: by_token,
}
