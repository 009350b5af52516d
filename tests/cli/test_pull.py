"""`hasten pull` and `hasten models` as a user sees them, and the offer of `hasten race`."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path

import pytest
import typer

from hasten.catalogue import pulling
from hasten.catalogue.entries import CATALOGUE, Entry
from hasten.catalogue.pulling import Pulled
from hasten.errors import UserError

SHA256 = "ab" * 32


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pulls put an empty file into the place; the names that were pulled."""
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names: list[str] = []

    def pull(entry: Entry, report) -> Pulled:
        names.append(entry.name)
        for done in (0, 40, 100):
            report(done, 100)
        entry.path.parent.mkdir(exist_ok=True)
        entry.path.touch()
        return Pulled(entry.path, 100, SHA256, "the hub (owner/model)")

    monkeypatch.setattr(pulling, "pull", pull)
    return names


def at_a_terminal(monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)


def test_pull(hasten, asked: list[str], tmp_path: Path):
    ran = hasten("pull", "smollm2")
    file = tmp_path / "models" / "smollm2.gguf"
    assert (ran.status, ran.err, asked) == (0, "", ["smollm2"])
    assert ran.out == f"smollm2 came from the hub (owner/model): {file}\nuse it: hasten race --model smollm2\n"


def test_pull_json(hasten, asked: list[str], tmp_path: Path):
    ran = hasten("pull", "smollm2", "--json")
    assert ran.err == "" and ran.json() == {
        "name": "smollm2",
        "path": str(tmp_path / "models" / "smollm2.gguf"),
        "bytes": 100,
        "sha256": SHA256,
        "source": "the hub (owner/model)",
    }


def test_pull_of_what_cannot_be_had(hasten, asked: list[str], monkeypatch: pytest.MonkeyPatch):
    def refuse(entry: Entry, report) -> Pulled:
        raise UserError("cannot pull smollm2: nobody has it")

    monkeypatch.setattr(pulling, "pull", refuse)
    ran = hasten("pull", "smollm2")
    assert (ran.status, ran.out, ran.err) == (2, "", "hasten: cannot pull smollm2: nobody has it\n")
    ran = hasten("pull", "smollm")
    assert ran.status == 2 and "no model 'smollm' to pull; there are smollm2, " in ran.err


@pytest.mark.parametrize(
    ("number", "status", "what"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "interrupted (SIGTERM)")]
)
def test_an_interrupted_pull_says_that_it_goes_on(
    hasten, asked: list[str], monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int, what: str
):
    monkeypatch.setattr(pulling, "pull", lambda entry, report: signal.raise_signal(number))
    ran = hasten("pull", "smollm2")
    assert (ran.status, ran.err) == (status, f"hasten: {what}: the next pull goes on with what is here\n")


def test_models(hasten, asked: list[str]):
    listed = hasten("models", "--json").json()
    assert {"tiny", *CATALOGUE} <= {model["name"] for model in listed}
    for model in listed:
        assert model.keys() == {"name", "title", "bytes", "licence", "state", "path", "repository"}
        assert model["bytes"] > 0 and model["licence"] and (model["path"] is None) == (model["state"] == "available")
    assert {model["state"] for model in listed} == {"shipped", "available"}
    hasten("pull", "smollm2")
    (pulled,) = (model for model in hasten("models", "--json").json() if model["state"] == "pulled")
    assert pulled["name"] == "smollm2"


def test_models_for_a_person(hasten, asked: list[str]):
    """Within 80 columns, the head with its folder aside."""
    hasten("pull", "smollm2")
    head, *lines = hasten("models").out.splitlines()
    assert head.startswith("here") and max(map(len, lines)) <= 80
    here, there = lines[: lines.index("to pull")], lines[lines.index("to pull") :]
    assert any(line.split()[0] == "smollm2" for line in here)
    assert any(line.split()[:3] == ["smollm2-360m", "386", "MB"] for line in there)


def test_models_remove(hasten, asked: list[str], tmp_path: Path):
    hasten("pull", "smollm2")
    assert hasten("models", "--remove", "smollm2").status == 0
    assert not (tmp_path / "models" / "smollm2.gguf").exists()
    ran = hasten("models", "--remove", "smollm2")
    assert (ran.status, ran.err) == (2, "hasten: smollm2 is not here\n")


@pytest.mark.parametrize("command", ["generate", "race"])
def test_a_model_that_is_not_here_is_one_sentence(hasten, asked: list[str], command: str):
    """Nobody is asked where there is no terminal."""
    ran = hasten(command, "Copy", "--model", "smollm2")
    assert ran.status == 2 and not asked
    assert ran.err == "hasten: smollm2 is not here yet: `hasten pull smollm2` gets it (98 MB)\n"


@pytest.mark.parametrize("typed", ["y\n", "Yes\n", "n\n", "\n", ""])
def test_race_offers_to_pull(hasten, asked: list[str], monkeypatch: pytest.MonkeyPatch, typed: str):
    pulled = typed[:1].lower() == "y"

    def load(self, model: str) -> None:
        assert CATALOGUE[model].path.is_file() == pulled
        raise typer.Exit

    at_a_terminal(monkeypatch, typed)
    monkeypatch.setattr("hasten.cli.options.Loading.load", load)
    ran = hasten("race", "--model", "smollm2")
    assert ran.status == 0 and asked == ["smollm2"] * pulled
    assert "smollm2 (SmolLM2-135M-Instruct, Q4_1, 98 MB, Apache-2.0) is not here yet. Pull it? [y/N] " in ran.err


def test_race_offers_nothing_where_its_output_is_read_by_a_program(
    hasten, asked: list[str], monkeypatch: pytest.MonkeyPatch
):
    at_a_terminal(monkeypatch, "y\n")
    assert hasten("race", "--model", "smollm2", "--json").status == 2
    assert not asked
