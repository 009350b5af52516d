"""`hasten methods`: the registry."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import options
from hasten.errors import UserError

if TYPE_CHECKING:
    from hasten.engine import Method


def methods(
    method: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="Show this one in full.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Show the defaults that METHOD has for this model.")
    ] = None,
    json: options.Json = False,
) -> None:
    """List every published system that works here by its role, or show one with its parameters."""
    if model is not None and method is None:
        raise UserError("name the method whose defaults for a model are to be shown")
    import hasten.methods  # noqa: F401  (a source tree that is not installed has no entry points)
    from hasten.engine import methods as registered
    from hasten.engine.registry import find

    chosen = list(registered().values()) if method is None else [find(method)]
    own = {} if model is None else chosen[0].defaults(options.Loading().load(model).engine.target)
    if json:
        options.emit([_entry(each, own) for each in chosen])
    elif method is None:
        _list(chosen)
    else:
        _show(chosen[0], own)


KEYS = ("slug", "aliases", "role", "family", "exactness", "paper", "title", "needs_training", "command")


def _entry(method: Method, own: dict[str, Any]) -> dict[str, Any]:
    """What `--json` says of one: the registry's fields, and its parameters with their defaults, or a model's `own`."""
    entry = {key: getattr(method, key) for key in KEYS}
    knob = None if method.knob is None else dataclasses.asdict(method.knob)
    return entry | {"aliases": list(method.aliases), "parameters": _defaults(method) | own, "knob": knob}


def _list(chosen: list[Method]) -> None:
    """A block per role, a line per method."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    width = max(len(method.slug) for method in chosen)
    for role in sorted({method.role for method in chosen}, key=_order):
        console.print(role.removesuffix("y") + ("ies" if role.endswith("y") else "s"), style="bold")
        for method in (each for each in chosen if each.role == role):
            loss = "lossy" if method.exactness == "lossy" else ""
            console.print(f"  {method.slug:<{width}} {loss:<5} {method.title}")
    console.print("hasten methods METHOD shows one in full.", style="dim")


def _order(role: str) -> int:
    from typing import get_args

    from hasten.engine.registry import Role

    return get_args(Role).index(role)


def _show(method: Method, own: dict[str, Any]) -> None:
    """Facts a line each, then parameters with their defaults, or a model's `own`."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(method.title, style="bold")
    facts = {
        "name": ", ".join((method.slug, *method.aliases)),
        "role": method.role,
        "exactness": method.exactness or "-",
        "source": f"arXiv {method.paper}" if method.paper else "-",
        "training": "needs weights trained for the model" if method.needs_training else "none",
        "at work": method.command,
        "knob": _knob(method),
    }
    for name, fact in facts.items():
        console.print(f"  {name:<10} {fact}")
    defaults = _defaults(method) | own
    if defaults:
        console.print("parameters, with their defaults", style="bold")
        for name, default in defaults.items():
            console.print(f"  {name}={default}")


def _knob(method: Method) -> str:
    """What `hasten sweep` turns, and how far."""
    knob = method.knob
    if knob is None:
        return "-"
    scaled = f" (times {', '.join(knob.scaled)})" if knob.scaled else ""
    return f"{knob.name}{scaled}, from careful to fast: {', '.join(f'{value:g}' for value in knob.values)}"


def _defaults(method: Method) -> dict[str, object]:
    return {field.name: field.default for field in dataclasses.fields(method.parameters)}
