"""Run the program in this process: fast, and with the same error handling as from a shell."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
