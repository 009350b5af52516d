"""`hasten train ppd` and its like: what they refuse before anything is made, and what they make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FEW = ("--model", "tiny", "--dialogues", "40", "--answer", "16", "--precision", "fp32")


@pytest.mark.parametrize("name", ["ppd", "hidden-transfer"])
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--prompts", "0"), "prompts must be between"),
        (("--tokens", "0"), "tokens, batch-tokens and batches-per-step must be positive"),
        (("--lr", "-1"), "lr must be positive"),
        (("--dialogues", "1"), "at least 2"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    hasten, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: tuple[str, ...], told: str
):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    ran = hasten("train", name, *FEW, "--output", str(tmp_path / "heads"), *options)
    assert ran.status == 2 and told in ran.err and ran.err.count("\n") == 1
    assert not (tmp_path / "cache").exists() and not (tmp_path / "heads").exists()


@pytest.mark.parametrize(("name", "parameters"), [("ppd", 3 * 256), ("hidden-transfer", 3 * 256 * 256)])
def test_they_are_made_and_found(
    hasten, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, questions: Path, name: str, parameters: int
):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "heads"
    few = ("train", name, *FEW, "--output", str(output), "--tokens", "1000")
    made = hasten(*few, "--spec-bench", str(questions), "--json").json()
    assert made["parameters"] == parameters and made["dialogues"] == 40
    card = json.loads((output / "config.json").read_text())
    assert len(card["accuracy"]) == 3 and len(card["fingerprint"]) == 16
    assert [row["category"] for row in card["spec_bench"]] == ["mt_bench", "qa", "overall"]
    assert {"command", "dialogues", "tokens", "seconds", "loss", "data_sha256"} <= card["training"].keys()
    ran = hasten(
        "verify", "--model", "tiny", "--method", f"{name}:head={output}", "--per-task", "1", "--max-tokens", "8"
    )
    assert ran.status == 0 and "identical" in ran.out
