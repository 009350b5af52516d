"""`hasten train dparallel` from questions to card, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hasten.tasks import TASKS
from hasten.train.answers import FILE


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks are enough."""
    for name in TASKS.keys() - {"copy", "reverse"}:
        monkeypatch.delitem(TASKS, name)


def test_distillation(hasten, lists: None, tmp_path: Path):
    command = ("train", "dparallel", "-o", str(tmp_path), "--prompts", "4", "--tokens", "1000", "--per-task", "1")
    document = hasten(*command, "--batch-tokens", "512", "--json").json()
    lines = (tmp_path / FILE).read_text().splitlines()[1:]
    assert document["asked"] == len(lines) == 4
    assert document["right"] == sum(json.loads(line)["right"] for line in lines) > 0
    assert json.loads((tmp_path / "config.json").read_text())["diffusion"]["block_length"] == 8
    card = Path(document["card"]).read_text()
    assert "hasten train dparallel" in card and f"{document['right']} of 4 questions" in card
    refused = hasten(*command, "--seed", "1")
    assert refused.status == 2 and "with another seed" in refused.err
    refused = hasten(*command, "--no-resume")
    assert refused.status == 2 and "exists" in refused.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model", "tiny"), "tiny is none"),
        (("--model", "nowhere"), "no checkpoint at 'nowhere'"),
        (("--prompts", "0"), "prompts"),
        (("--temperature", "0"), "temperature"),
        (("--threads", "-1"), "threads"),
    ],
)
def test_what_cannot_be_distilled(hasten, tmp_path: Path, options: tuple[str, ...], words: str):
    output = tmp_path / "model"
    ran = hasten("train", "dparallel", "-o", str(output), *options)
    assert (ran.status, ran.out) == (2, "") and words in ran.err and ran.err.count("\n") == 1
    assert not output.exists()


def test_an_output_that_is_no_folder(hasten, tmp_path: Path):
    (tmp_path / "file").write_text("")
    for command in ("dparallel", "mdm"):
        ran = hasten("train", command, "-o", str(tmp_path / "file"))
        assert ran.status == 2 and "cannot make the folder" in ran.err and ran.err.count("\n") == 1
