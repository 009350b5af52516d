"""`hasten train align` and `s2d`: what they refuse before anything is made, and what they make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FEW = ("--model", "tiny", "--dialogues", "40", "--answer", "16")
SMALL = ("--hidden", "48", "--layers", "2", "--heads", "2", "--kv-heads", "1", "--ffn", "96", "--words", "300")


@pytest.mark.parametrize(
    ("command", "options", "told"),
    [
        ("align", ("--loss", "l2"), "loss must be one of"),
        ("align", ("--epochs", "0"), "epochs must be positive"),
        ("align", ("--opening", "2"), "opening must be between"),
        ("align", ("--heads", "5"), "hidden must be an even multiple"),
        ("align", ("--streams", "9"), "streams must be between 1 and 8"),
        ("s2d", ("--exits", "2/4"), "exits must end with 6"),
        ("s2d", ("--exits", "6"), "exits must be ascending"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    hasten, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, options: tuple[str, ...], told: str
):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    ran = hasten("train", command, *FEW, "--output", str(tmp_path / "draft"), *options)
    assert ran.status == 2 and told in ran.err and ran.err.count("\n") == 1
    assert not (tmp_path / "cache").exists() and not (tmp_path / "draft").exists()


def test_drafters_are_made_of_the_same_dialogues(
    hasten, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, questions: Path
):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    for command, method, more in (
        ("align", "draft-model", ()),
        ("align", "mirror-sd", ("--streams", "2")),
        ("s2d", "s2d", ("--exits", "1/2")),
    ):
        folder = tmp_path / method
        few = ("train", command, *FEW, "--output", str(folder), *SMALL, *more, "--epochs", "0.5")
        made = hasten(*few, "--spec-bench", str(questions), "--json").json()
        card = json.loads((folder / "card.json").read_text())
        assert card["acceptance"] == made["acceptance"] and len(card["acceptance"]) == 1 + (command == "s2d")
        assert [row["category"] for row in card["spec_bench"]] == ["mt_bench", "qa", "overall"]
        assert card["command"].startswith("hasten") and card["dialogues"] >= 40 > card["held_out"] > 0
        ran = hasten(
            "verify", "--model", "tiny", "--method", f"{method}:model={folder}", "--per-task", "1", "--max-tokens", "8"
        )
        assert ran.status == 0 and "identical" in ran.out
        assert (folder / "streams.safetensors").exists() == ("streams" in card) == (method == "mirror-sd")
    assert len(list((tmp_path / "cache" / "dialogues").iterdir())) == 1
