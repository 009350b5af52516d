"""`hasten train medusa` and its like: what it refuses before anything is made, and what it makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FEW = ("train", "medusa", "--model", "tiny", "--dialogues", "40", "--answer", "16")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--heads", "0"), "heads must be between"),
        (("--store", "q2_k"), "store must be bf16, q8_0 or q4_1"),
        (("--epochs", "nan"), "epochs must be positive"),
        (("--epochs", "0"), "epochs must be positive"),
        (("--lr", "-1"), "lr must be positive"),
        (("--states-bytes", "3x"), "states-bytes"),
        (("--dialogues", "1"), "at least 2"),
        (("--batches-per-step", "-1"), "batches-per-step must be positive"),
        (("--joint", "--opening", "1"), "opening must be"),
        (("--data", "none.jsonl"), "cannot read prompts"),
        (("--spec-bench", "none.jsonl"), "cannot read prompts"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    hasten, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], told: str
):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    ran = hasten(*FEW, "--output", str(tmp_path / "heads"), *options)
    assert ran.status == 2 and told in ran.err and ran.err.count("\n") == 1
    assert not (tmp_path / "cache").exists() and not (tmp_path / "heads").exists()


def test_heads_are_made_and_found(hasten, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, questions: Path):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    heads = tmp_path / "heads"
    few = (*FEW, "--output", str(heads), "--epochs", "0.5", "--words", "300")
    made = hasten(*few, "--spec-bench", str(questions), "--json").json()
    assert made["parameters"] == 4 * (256 * 256 + 256) + 300 * 256 and (heads / "model.safetensors").exists()
    told = json.loads((heads / "config.json").read_text())
    assert len(told["fingerprint"]) == 16 and str(tmp_path) not in json.dumps(told["training"]["config"])
    assert told["training"]["dialogues"] == 40 and told["training"]["command"] == made["command"]
    assert len(told["accuracy"]) == 4 and told["spec_bench"] == made["spec_bench"]
    rows = {row["category"]: row for row in told["spec_bench"]}
    assert {name: (row["questions"], row["prompts"]) for name, row in rows.items()} == {
        "mt_bench": (1, 2), "qa": (1, 1), "overall": (2, 3)
    }  # fmt: skip
    assert all(row["identical"] == row["prompts"] and row["tokens_per_step"] >= 1 for row in rows.values())
    # The same dialogues serve another run; other ones stand beside them.
    hasten(*FEW, "--output", str(tmp_path / "other"), "--heads", "1", "--epochs", "0.1")
    assert len(list((tmp_path / "cache" / "dialogues").iterdir())) == 1
    ran = hasten(
        "verify", "--model", "tiny", "--method", f"medusa:head={heads}", "--per-task", "1", "--max-tokens", "8"
    )
    assert ran.status == 0 and "identical" in ran.out


def test_a_model_that_learns_with_its_heads_says_how_far_it_is_from_what_it_was(
    hasten, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    nowhere = hasten(*FEW, "--joint")
    assert nowhere.status == 2 and "--output must say where" in nowhere.err
    model, options = tmp_path / "model", ("--joint", "--epochs", "0.5", "--words", "300", "--per-task", "1", "--json")
    made = hasten(*FEW, "--output", str(model), *options).json()
    assert made["output"] == str(model / "heads" / "medusa") and made["command"].startswith("hasten")
    card = json.loads((model / "card.json").read_text())
    assert card["parent"] == "tiny" and card["distance"]["rows"] > 50
    assert 0 <= card["distance"]["kl"] < 0.1 and card["distance"]["top1"] > 0.9
    assert card["tasks"].keys() == card["parent_tasks"].keys()
    assert "another model than `tiny`" in (model / "README.md").read_text()
    told = json.loads((model / "heads" / "medusa" / "config.json").read_text())
    assert len(told["fingerprint"]) == 16 and told["target"] == "model"
    ran = hasten("verify", "--model", str(model), "--method", "medusa", "--per-task", "1", "--max-tokens", "8")
    assert ran.status == 0 and "identical" in ran.out


def test_heads_with_a_layer_of_their_own_are_made_and_found(hasten, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    heads = tmp_path / "heads"
    options = ("--epochs", "0.5", "--words", "300", "--heads", "2", "--layers", "2", "--prefix")
    hasten("train", "hydra", *FEW[2:], "--output", str(heads), *options)
    told = json.loads((heads / "config.json").read_text())
    assert told["hydra_head_arch"] == "prefix-mlp" and told["training"]["config"]["store"] == "q4_1"
    ran = hasten("verify", "--model", "tiny", "--method", f"hydra:head={heads}", "--per-task", "1", "--max-tokens", "8")
    assert ran.status == 0 and "identical" in ran.out


def test_chimera_refuses_a_layer_that_cannot_be(hasten, tmp_path: Path):
    ran = hasten("train", "chimera", "--model", "tiny", "--ffn", "40", "--output", str(tmp_path / "heads"))
    assert ran.status == 2 and "ffn a multiple of 16" in ran.err and not (tmp_path / "heads").exists()


@pytest.mark.parametrize("version", ["1", "3"])
def test_eagle_is_made_and_found(hasten, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    head, asked = tmp_path / "head", ("train", "eagle", *FEW[2:], "--version", version, "--words", "300")
    made = hasten(*asked, "--output", str(head), "--epochs", "0.3", "--json").json()
    told = json.loads((head / "config.json").read_text())
    assert len(told["accuracy"]) == 4 and made["parameters"] > 0 and "eagle" in str(told["training"]["command"])
    ran = hasten("verify", "--model", "tiny", "--method", f"eagle:head={head}", "--per-task", "1", "--max-tokens", "8")
    assert ran.status == 0 and "identical" in ran.out
    # Medusa's states are among those of EAGLE-3.
    hasten(*FEW, "--output", str(tmp_path / "other"), "--heads", "1", "--epochs", "0.1")
    assert (tmp_path / "other" / "model.safetensors").exists()
    kept = [file.name for file in (tmp_path / "cache" / "dialogues").glob("*/*.bin")]
    assert kept == ["final_norm.bin" if version == "1" else "eagle3.bin"]


@pytest.mark.parametrize(
    ("options", "told"), [(("--version", "2"), "version must be 1 or 3"), (("--steps", "9"), "steps")]
)
def test_eagle_that_cannot_be_is_refused(hasten, tmp_path: Path, options: tuple[str, ...], told: str):
    ran = hasten("train", "eagle", *FEW[2:], "--output", str(tmp_path / "head"), *options)
    assert ran.status == 2 and told in ran.err and not (tmp_path / "head").exists()
