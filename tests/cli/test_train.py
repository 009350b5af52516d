"""`hasten train` from questions to card, what it refuses, and that the same command finishes what was killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hasten.bench import scylla
from hasten.train import card
from hasten.train.answers import FILE
from hasten.train.data import Batch
from hasten.train.lm import Pretraining
from hasten.train.skipdecode import ScheduledTuning
from hasten.train.summary import SUMMARY
from hasten.train.trainer import CHECKPOINT, Trainer


@pytest.fixture
def lists(only_tasks: Callable[..., None]) -> None:
    """Two tasks are enough."""
    only_tasks("copy", "reverse")


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


def test_skipdecode(hasten, lists: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The card has the parent's answers and the new model's, by all layers and by each share."""
    monkeypatch.setattr(ScheduledTuning, "weights", {"copy": 1.0})
    short = ("--tokens", "600", "--batch-tokens", "512", "--per-task", "1")
    command = ("train", "skipdecode", "-o", str(tmp_path), *short)
    document = hasten(*command, "--shares", "0.8,0.6", "--json").json()
    assert json.loads((tmp_path / "config.json").read_text())["skipdecode"]["share"] == 0.8
    decoded = json.loads((tmp_path / "card.json").read_text())["decoded"]
    methods = ["plain", *(f"skipdecode:share={share},warm=1,length=64" for share in (0.8, 0.6))]
    assert list(decoded) == [f"{name}, {method}" for name in ("tiny", tmp_path.name) for method in methods]
    assert all(f"| `{method}` |" in Path(document["card"]).read_text() for method in decoded)
    refused = hasten(*command, "--shares", "half")
    assert refused.status == 2 and "shares must be numbers" in refused.err and refused.err.count("\n") == 1


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
    filter_file = str(tmp_path / "file" / "filter.safetensors")
    for command, output in (("dparallel", "file"), ("mdm", "file"), ("learn2pd", filter_file)):
        ran = hasten("train", command, "-o", str(tmp_path / output), *(("-m", "tiny-block") if "." in output else ()))
        assert ran.status == 2 and "cannot make the folder" in ran.err and ran.err.count("\n") == 1


def test_a_command_that_was_stopped_at_its_card_goes_on_there(
    hasten, lists: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    command = ["train", "lm", "-o", str(tmp_path), "--tokenizer", "tiny", "--per-task", "1", "--threads", "1", "--json"]
    for name, value in {"hidden": 16, "layers": 1, "ffn": 16, "context": 128, "tokens": 500}.items():
        command += [f"--{name}", str(value)]
    command += ["--batch-tokens", "256", "--heads", "2", "--kv-heads", "1"]

    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pretraining, "weights", {"copy": 1.0}, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(card, "task_scores", stopped)
        ran = hasten(*command)
    assert (ran.status, ran.out) == (130, "") and ran.err.endswith("hasten: interrupted\n")
    assert (tmp_path / SUMMARY).exists() and not (tmp_path / "README.md").exists()
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("trained again"))
    ran = hasten(*command)
    assert ran.status == 0 and "is not trained again" in ran.err
    summary = json.loads((tmp_path / SUMMARY).read_text())
    assert ran.json() == {"output": str(tmp_path), "card": str(tmp_path / "README.md"), **summary}
    assert summary["data_sha256"][:16] in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "card.json").read_text()).items() >= summary.items()
    written = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md.new").mkdir()
    refused = hasten(*command)
    assert refused.status == 2 and "cannot write" in refused.err and (tmp_path / "README.md").read_text() == written
    refused = hasten(*command, "--seed", "1")
    assert refused.status == 2 and refused.err.endswith("was made with another seed\n")


def test_a_family_is_finished_member_by_member(hasten, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained, step = [], Trainer.step

    def counted(self: Trainer, batch: Batch) -> None:
        trained.append(self.folder.name)
        step(self, batch)

    def stopped(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "step", counted)
    monkeypatch.setattr(Pretraining, "weights", {"copy": 1.0}, raising=False)
    monkeypatch.setattr(scylla, "scylla", stopped)
    command = ["train", "scylla", "-o", str(tmp_path), "--tokens", "1,2,3,4", "--layers", "1,2,3,4", "--hidden", "8"]
    first, *others = [f"tokens-{n}-layers-2" for n in (1, 2, 3, 4)] + [f"tokens-3-layers-{n}" for n in (1, 3, 4)]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stopped)
        assert hasten(*command, "--threads", "1").status == 130
    assert trained == [first] and (tmp_path / first / SUMMARY).exists() and (tmp_path / first / CHECKPOINT).exists()
    trained.clear()
    for expected in (others, []):
        assert hasten(*command, "--threads", "1").status == 130
        assert trained == expected
        for name in (first, *others):
            assert (tmp_path / name / SUMMARY).exists() and not (tmp_path / name / CHECKPOINT).exists()
        trained.clear()
    refused = hasten(*command, "--seed", "1")
    assert refused.status == 2 and refused.err.endswith("was made with another seed\n")
