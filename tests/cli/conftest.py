"""Run the program in this process: fast, and with the same error handling as from a shell."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hasten.cli import main


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(scope="session", autouse=True)
def short_measurements() -> Iterator[None]:
    """Nobody reads the times: the fewest passes per shape, behind short contexts, and reads of a small buffer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hasten.engine.drafting.cost.MEASURE_SECONDS", 0)
        patch.setattr("hasten.engine.drafting.cost.CONTEXTS", (16, 64))
        patch.setattr("hasten.bench.doctor.BANDWIDTH_BYTES", 2**22)
        yield


@pytest.fixture
def hasten(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """hasten("race", "--json") -> exit status, stdout, stderr."""

    def run(*arguments: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["hasten", *arguments])
        with pytest.raises(SystemExit) as leaving:
            main()
        captured = capsys.readouterr()
        code = leaving.value.code
        return Ran(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """A file as Spec-Bench has it: a conversation of two turns, and a question of another category."""
    lines = [
        {"category": "writing", "turns": ["Copy the list: red cat", "Copy the list: moon salt"]},
        {"category": "qa", "turns": ["Sort the list: 4 2 9"]},
    ]
    file = tmp_path / "question.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file
