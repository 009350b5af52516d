"""`hasten models`: what is here, and what can be pulled."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hasten.cli import options

SHIPPED, PULLED, AVAILABLE = "shipped", "pulled", "available"


def models(
    remove: Annotated[str | None, typer.Option(metavar="NAME", help="Delete this one, which was pulled.")] = None,
    json: options.Json = False,
) -> None:
    """List the models that go by a name: those that are here, and those that `hasten pull` gets."""
    from hasten.catalogue import entries, pulling

    if remove is not None:
        pulling.remove(entries.named(remove))
    listed = [*_shipped(), *_catalogue()]
    if json:
        options.emit(listed)
    else:
        _print(listed)


def _shipped() -> list[dict[str, Any]]:
    from hasten.catalogue.entries import ASSETS, shipped

    return [
        {
            "name": name,
            "title": "ships with hasten",
            "bytes": (ASSETS / name / "model.safetensors").stat().st_size,
            "licence": "Apache-2.0",
            "state": SHIPPED,
            "path": str(ASSETS / name),
            "repository": None,
        }
        for name in shipped()
    ]


def _catalogue() -> list[dict[str, Any]]:
    from hasten.catalogue.entries import CATALOGUE

    return [
        {
            "name": entry.name,
            "title": entry.title,
            "bytes": entry.path.stat().st_size if here else entry.size,
            "licence": entry.licence,
            "state": PULLED if here else AVAILABLE,
            "path": str(entry.path) if here else None,
            "repository": entry.repository,
        }
        for entry in CATALOGUE.values()
        for here in [entry.path.is_file()]
    ]


def _print(listed: list[dict[str, Any]]) -> None:
    """A line per model, within 80 columns."""
    from rich.console import Console

    from hasten.files import cache_folder, megabytes

    console = Console(highlight=False, soft_wrap=True)
    width = max(len(model["name"]) for model in listed)
    heads = {f"here (those that were pulled, in {cache_folder('models')})": (SHIPPED, PULLED), "to pull": (AVAILABLE,)}
    for head, states in heads.items():
        console.print(head, style="bold", markup=False)
        for model in (model for model in listed if model["state"] in states):
            where = model["repository"] if model["state"] == AVAILABLE else model["title"]
            size = megabytes(model["bytes"])
            console.print(f"  {model['name']:<{width}} {size:>7}  {model['licence']}  {where}", markup=False)
    console.print("hasten pull NAME gets one; every command takes its name (--model).", style="dim")
