"""Ctrl-C and SIGTERM end a command with one sentence and the status that a shell expects."""

from __future__ import annotations

import json
import signal
import threading

import pytest

from hasten.bench import race, tune
from hasten.cli import app

COMMAND = ("race", "Copy", "--max-tokens", "2", "--json")


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


def terminate(*arguments: object) -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("stop", "status", "sentence"),
    [(interrupt, 130, "interrupted"), (terminate, 143, "interrupted (SIGTERM)")],
)
def test_a_command_that_is_stopped(hasten, monkeypatch: pytest.MonkeyPatch, stop, status: int, sentence: str):
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(race, "race", stop)
    ran = hasten(*COMMAND)
    assert (ran.status, ran.out, ran.err) == (status, "", f"hasten: {sentence}\n")
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_second_sigterm_changes_nothing(hasten, monkeypatch: pytest.MonkeyPatch):
    """`timeout` sends two."""

    def say(sentence: str, status: int, say=app._say) -> int:
        terminate()
        return say(sentence, status)

    monkeypatch.setattr(race, "race", terminate)
    monkeypatch.setattr(app, "_say", say)
    assert hasten(*COMMAND).err == "hasten: interrupted (SIGTERM)\n"


@pytest.mark.parametrize(("stop", "status"), [(interrupt, 130), (terminate, 143)])
def test_tune_tells_what_it_knows_by_then(hasten, tmp_path, monkeypatch: pytest.MonkeyPatch, stop, status: int):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Copy", "Sort")))
    monkeypatch.setattr(tune._Search, "choose", stop)
    ran = hasten("tune", "--prompts", str(prompts), "--candidates", "ngram", "--json")
    assert ran.status == status and ran.json()["interrupted"] is True
    assert ran.err.startswith("hasten: interrupted") and ran.err.count("\n") == 1


def test_the_program_runs_in_a_thread(hasten):
    """Where no signal can be caught."""
    ran = []
    thread = threading.Thread(target=lambda: ran.append(hasten("methods", "--json")))
    thread.start()
    thread.join()
    assert ran[0].status == 0
