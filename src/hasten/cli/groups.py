"""Options that several commands share, as a dataclass: its fields say what they are, and exist once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer reads it: a parameter whose default is a dataclass becomes that one's fields.

    The default's values are the options' defaults; the command gets the dataclass, filled.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: list[Parameter] = []
    groups: dict[str, type[Any]] = {}
    for name, parameter in signature(command).parameters.items():
        if not is_dataclass(parameter.default):
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        groups[name] = kind = type(parameter.default)
        for option, annotation in get_type_hints(kind, include_extras=True).items():
            default = getattr(parameter.default, option)
            parameters.append(parameter.replace(name=option, annotation=annotation, default=default))

    @wraps(command)
    def called(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        command(**given)

    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    called.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return called
