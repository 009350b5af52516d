"""Chat templates as transformers renders them, without importing it; those that need more of it are not simple."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template

BEYOND = {"namespace", "dict", "generation"}
"""Names that transformers gives a meaning of its own, which is guarded against templates that want to break out."""


def is_simple(template: str, messages: Any) -> bool:
    """Whether `render` does what transformers does: a role and a text per message, and none of its own names."""
    plain = isinstance(messages, list) and len(messages) > 0
    return plain and all(map(_is_text, messages)) and not _names(template) & BEYOND


def _is_text(message: Any) -> bool:
    return type(message) is dict and message.keys() == {"role", "content"} and set(map(type, message.values())) == {str}


@lru_cache
def _names(template: str) -> frozenset[str]:
    """All names in a template; one that is none has all of them, so that transformers tells what is wrong."""
    from jinja2 import Environment, TemplateError

    try:
        return frozenset(text for _, kind, text in Environment().lex(template) if kind == "name")
    except TemplateError:
        return frozenset(BEYOND)


@lru_cache
def _compiled(template: str) -> Template:
    """The template, in a sandbox: it can change nothing of what it gets."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # Jinja's own makes HTML of it.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def render(template: str, messages: Sequence[Mapping[str, str]], named: Mapping[str, str]) -> str:
    """The text of a conversation, ready for the assistant's turn.

    Args:
        named: special tokens by transformers' names.

    Raises:
        Exception: whatever the template raises.
    """
    values = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
    return _compiled(template).render(**values, **named)
