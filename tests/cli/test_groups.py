"""Options that stand in a dataclass: Typer reads them like a signature's own, and the command gets them together."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from hasten.cli.groups import grouped


@dataclass(frozen=True)
class Paint:
    colour: Annotated[str, typer.Option(help="Of the wall.")] = "white"
    coats: int = 1


def run(command: object, *arguments: str) -> str:
    app = typer.Typer()
    app.command()(command)  # type: ignore[type-var]
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False).output


def test_fields_are_options_where_the_group_stands_with_the_commands_own_defaults() -> None:
    @grouped
    def wall(metres: int, paint: Paint = Paint(coats=2), dry: bool = False) -> None:
        """Paint a wall."""
        print(metres, paint, dry)

    assert list(inspect.signature(wall).parameters) == ["metres", "colour", "coats", "dry"]
    assert run(wall, "3") == "3 Paint(colour='white', coats=2) False\n"
    assert run(wall, "3", "--colour", "red", "--coats", "5", "--dry") == "3 Paint(colour='red', coats=5) True\n"
    told = run(wall, "--help")
    assert "Paint a wall." in told and "Of the wall." in told and "[default: 2]" in told


def test_two_options_of_one_name_are_refused() -> None:
    def wall(coats: int = 1, paint: Paint = Paint()) -> None:
        pass

    with pytest.raises(ValueError, match="coats"):
        grouped(wall)
