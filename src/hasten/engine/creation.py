"""From a specification to what does it: `slug:key=value+slug` to a drafter, or to a context policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from hasten.engine.context import ContextPolicy
from hasten.engine.drafting.composition import FirstOf
from hasten.engine.drafting.drafter import Drafter
from hasten.engine.registry import CONTEXT_POLICIES, DECODERS, Role, Target, find, parse, read, split
from hasten.errors import UserError


def create(spec: str, target: Target) -> Drafter:
    """The drafter of a method specification, for one target.

    `a+b` is a composition: where `a` has nothing to propose, `b` is asked.

    Raises:
        UserError: unknown method or key, a value of the wrong type or out of range.
    """
    parts = split(spec)
    drafters: list[Drafter] = [_create(part, target) for part in parts]
    if len(drafters) == 1:
        return drafters[0]
    for part, drafter in zip(parts, drafters, strict=True):
        refuse_alone(part, drafter, "a part of a composition")
    return FirstOf(drafters)


def create_context(spec: str, target: Target) -> ContextPolicy:
    """The context policy of a specification, for one target.

    Raises:
        UserError: unknown method or key, a value of the wrong type or out of range, a system that is something else.
    """
    policy: ContextPolicy = _create(spec, target, CONTEXT_POLICIES)
    return policy


def _create(spec: str, target: Target, roles: Sequence[Role] = DECODERS) -> Any:
    """What a method makes of what is named, else of the target's own defaults, else of its own."""
    method, named = read(spec, roles)
    assert method.create is not None
    return method.create(target, method.parameters(**{**method.defaults(target), **named}))


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
