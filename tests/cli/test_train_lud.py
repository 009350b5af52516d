"""`hasten train lud`: what it refuses before anything is made, and what it makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

FEW = ("--dialogues", "40", "--answer", "16", "--precision", "fp32", "--per-task", "1", "--threads", "1")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--placeholders", "0"), "placeholders must be between"),
        (("--epochs", "0"), "epochs must be positive"),
        (("--alpha", "2"), "alpha must be"),
        (("--lr", "-1"), "lr must be positive"),
        (("--model", "tiny-block"), "no folder of a Llama"),
        (("--model", "nowhere"), "no checkpoint at 'nowhere'"),
        (("--dialogues", "1"), "at least 2"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(hasten, tmp_path: Path, options: tuple[str, ...], told: str):
    ran = hasten("train", "lud", *FEW, "--output", str(tmp_path / "model"), *options)
    assert ran.status == 2 and told in ran.err and ran.err.count("\n") == 1
    assert not (tmp_path / "cache" / "dialogues").exists() and not (tmp_path / "model").exists()


def test_it_is_made_and_decodes(hasten, tmp_path: Path, only_tasks: Callable[..., None]):
    only_tasks("reverse", "sql")
    output = tmp_path / "model"
    command = ("train", "lud", *FEW, "--output", str(output), "--epochs", "0.5", "--json")
    made = hasten(*command).json()
    assert made["dialogues"] == 40 and made["config"]["placeholders"] == 3
    card = (output / "README.md").read_text()
    assert "hasten train lud" in card and "| `tiny, plain` |" in card and "| `lud:beta=0.9` |" in card
    decoded = json.loads((output / "card.json").read_text())["decoded"]
    assert decoded["plain"]["sql"]["tokens"] == decoded["plain"]["sql"]["steps"] > 0
    assert "is not trained again" in hasten(*command).err
    ran = hasten("generate", "Reverse the list: red cat\nAnswer:", "--model", str(output), "--method", "lud", "--json")
    assert ran.json()["token_ids"]
    (output / "lud.safetensors").unlink()
    ran = hasten("generate", "x", "--model", str(output), "--method", "lud")
    assert ran.status == 2 and "was not trained for it: `hasten train lud" in ran.err and ran.err.count("\n") == 1
