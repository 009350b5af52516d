"""The registry of methods: what exists, how it is named, and how `slug:key=value+slug` becomes a drafter."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_type_hints

from hasten.engine.composition import FirstOf
from hasten.engine.drafter import Drafter
from hasten.errors import UserError

if TYPE_CHECKING:
    from hasten.model.decoder import Model

Exactness = Literal["lossless", "lossy"]
ENTRY_POINTS = "hasten.methods"


@dataclass(frozen=True)
class Target:
    """What a method may know of the model it accelerates.

    `tokenizer` is None for models without one (oracles); `folder` is the checkpoint's, where there is one; `end_ids`
    are all tokens that end a text.
    """

    model: Model
    tokenizer: Any = None
    folder: str | None = None
    end_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        slug: its name on the command line and in reports.
        family: the group it belongs to, such as "drafters".
        exactness: `lossless` gives plain decoding's tokens; `lossy` does not.
        paper: identifier of the source, such as an arXiv number; empty where there is none.
        title: one line.
        needs_training: whether it needs weights that have to be trained for the target.
        parameters: a dataclass with defaults; its fields are what `slug:key=value` sets.
        create: (target, parameters) to a drafter.
    """

    slug: str
    family: str
    exactness: Exactness
    paper: str
    title: str
    needs_training: bool
    parameters: type[Any]
    create: Callable[[Target, Any], Drafter]


_METHODS: dict[str, Method] = {}
D = TypeVar("D", bound=Callable[[Target, Any], Drafter])


def register(
    slug: str,
    *,
    family: str,
    exactness: Exactness,
    paper: str,
    title: str,
    parameters: type[Any],
    needs_training: bool = False,
) -> Callable[[D], D]:
    """Decorator of a class, or of a function, that makes the drafter from (target, parameters)."""

    def decorate(create: D) -> D:
        _METHODS[slug] = Method(slug, family, exactness, paper, title, needs_training, parameters, create)
        return create

    return decorate


@cache
def _load_entry_points() -> None:
    """Import hasten's own methods and third parties': both register through the same entry-point group."""
    for point in entry_points(group=ENTRY_POINTS):
        point.load()


def methods() -> Mapping[str, Method]:
    """All registered methods by slug."""
    _load_entry_points()
    return dict(sorted(_METHODS.items()))


def find(slug: str) -> Method:
    """A method by slug.

    Raises:
        UserError: unknown, with the nearest names.
    """
    known = methods()
    if slug not in known:
        near = difflib.get_close_matches(slug, known, n=3, cutoff=0.4) or list(known)
        raise UserError(f"unknown method {slug!r}; did you mean {', '.join(near)}?")
    return known[slug]


def parse(spec: str) -> tuple[Method, Any]:
    """`slug` or `slug:key=value,key=value` to a method and its parameters.

    Raises:
        UserError: unknown method or key, a value of the wrong type or out of range.
    """
    slug, _, rest = spec.partition(":")
    method = find(slug.strip())
    types = get_type_hints(method.parameters)
    fields = {field.name: types[field.name] for field in dataclasses.fields(method.parameters)}
    values: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, text = item.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key not in fields:
            names = ", ".join(fields) or "none"
            raise UserError(f"{slug} has no parameter {key!r}; its parameters are: {names}")
        values[key] = _convert(slug, key, text.strip(), fields[key])
    return method, method.parameters(**values)


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
            return kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise UserError(f"{slug}: {key} must be {wanted}, not {text!r}") from None
    return text


def split(spec: str, separator: str = "+") -> list[str]:
    """The parts of a composition `a+b:key=value`; a separator inside a value (a file name) separates nothing."""
    parts: list[str] = []
    for piece in spec.split(separator):
        slug = piece.partition(":")[0].strip()
        if parts and ":" in parts[-1] and slug not in methods():
            parts[-1] += separator + piece
        else:
            parts.append(piece)
    return parts


def create(spec: str, target: Target) -> Drafter:
    """The drafter of a method specification, for one target.

    `a+b` is a composition: where `a` has nothing to propose, `b` is asked.

    Raises:
        UserError: unknown method or key, a value of the wrong type or out of range.
    """
    drafters = [method.create(target, parameters) for method, parameters in map(parse, split(spec))]
    if len(drafters) == 1:
        return drafters[0]
    for part, drafter in zip(split(spec), drafters, strict=True):
        refuse_alone(part, drafter, "a part of a composition")
    return FirstOf(drafters)


def refuse_alone(spec: str, drafter: Drafter, place: str) -> None:
    """Refuse a drafter that must be the whole method.

    Args:
        spec: its specification.
        place: what it was named as, for the message.

    Raises:
        UserError: it must be.
    """
    if drafter.alone:
        slug = spec.partition(":")[0].strip()
        takes = any(field.name == "drafter" for field in dataclasses.fields(find(slug).parameters))
        hint = f"; the others can be its own ({slug}:drafter=...)" if takes else ""
        raise UserError(f"{slug} cannot be {place}, since it must be the whole method{hint}")


def is_lossless(spec: str) -> bool:
    """Whether every part of a specification gives plain decoding's tokens."""
    return all(parse(part)[0].exactness == "lossless" for part in split(spec))
