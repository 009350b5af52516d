"""`hasten methods`: the registry."""

from __future__ import annotations

import dataclasses

from hasten.cli import options


def methods(json: options.Json = False) -> None:
    """List every method with its family, exactness, source and parameters."""
    from rich.console import Console
    from rich.table import Table

    import hasten.methods  # noqa: F401  (a source tree that is not installed has no entry points)
    from hasten.engine import methods as registered

    known = registered().values()
    if json:
        keys = ("slug", "family", "exactness", "paper", "title", "needs_training")
        options.emit(
            [
                {key: getattr(method, key) for key in keys} | {"parameters": _defaults(method.parameters)}
                for method in known
            ]
        )
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("method", "family", "exactness", "source", "what it does", "parameters"):
        table.add_column(column)
    for method in known:
        defaults = " ".join(f"{key}={value}" for key, value in _defaults(method.parameters).items())
        table.add_row(method.slug, method.family, method.exactness, method.paper, method.title, defaults)
    Console().print(table)


def _defaults(parameters: type) -> dict[str, object]:
    return {field.name: field.default for field in dataclasses.fields(parameters)}
