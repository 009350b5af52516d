"""What the files in deploy/ ask of the server is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hasten.cli.app import app

DEPLOY = Path(__file__).parent.parent / "deploy"
FILES = sorted(DEPLOY.iterdir())


@pytest.mark.parametrize("file", FILES, ids=[file.name for file in FILES])
def test_options_and_routes_are_there(file: Path):
    text = file.read_text()
    served = CliRunner().invoke(app, ["serve", "--help"]).output
    routes = (DEPLOY.parent / "src/hasten/serve/routes.py").read_text()
    lines = [line for line in text.splitlines() if re.search(r"hasten.*serve|args:|^ *command|^CMD|^ENTRYPOINT", line)]
    options = set(re.findall(r"--[a-z][a-z-]+", " ".join(lines)))
    assert lines and options
    for option in options:
        assert f"{option} " in served
    for route in re.findall(r"(?:path: |8000)(/[a-z]+)", text):
        assert f'"{route}"' in routes
