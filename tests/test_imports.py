"""The house: imports point downwards only, and no file is imported by what it imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hasten

ROOT = Path(hasten.__file__).parent
FLOORS = [
    "errors",
    "documents",
    "files",
    "catalogue",
    "tasks",
    "model",
    "cache",
    "engine",
    "methods",
    "inputs",
    "generation_config",
    "llm",
    "conversation",
    "train",
    "bench",
    "serve",
    "cli",
]
"""From the ground up. `__init__`, the face, and `__main__` stand on the roof."""


def modules() -> dict[str, Path]:
    """Dotted names below `hasten`, and their files."""
    files = [file for file in ROOT.rglob("*.py") if file.parent != ROOT or not file.stem.startswith("__")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imported(tree: ast.AST, known: dict[str, Path], types: bool) -> Iterator[str]:
    """What a module imports of hasten when it is loaded, and (`types`) also for annotations and within functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hasten":
            base = (node.module or "").partition(".")[2]
            for alias in node.names:
                full = f"{base}.{alias.name}".lstrip(".")
                yield full if full in known else base
        elif isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("hasten."))
        elif types or not (
            isinstance(node, ast.FunctionDef)
            or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))
        ):
            yield from imported(node, known, types)


def graph(types: bool) -> dict[str, set[str]]:
    known = modules()
    return {
        name: {other for other in imported(ast.parse(file.read_text()), known, types) if other in known} - {name}
        for name, file in known.items()
    }


def test_no_import_points_upwards() -> None:
    """Annotations and imports within functions count, too."""
    for name, others in graph(types=True).items():
        own = FLOORS.index(name.split(".")[0])
        higher = [other for other in others if FLOORS.index(other.split(".")[0]) > own]
        assert not higher, f"{name} imports {', '.join(higher)}"


@pytest.mark.parametrize("types", [False, True])
def test_no_circle(types: bool) -> None:
    """Nor one of annotations."""
    try:
        list(TopologicalSorter(graph(types)).static_order())
    except CycleError as error:
        raise AssertionError(f"a circle: {' imports '.join(error.args[1][::-1])}") from None
