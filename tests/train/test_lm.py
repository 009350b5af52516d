"""Pre-training: deterministic, resumable to the same weights, and loadable by transformers."""

from __future__ import annotations

import itertools
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hasten.errors import UserError
from hasten.tasks import split_of
from hasten.train.data import IGNORE, Mixture
from hasten.train.lm import Pretraining
from hasten.train.recipe import SHORT
from hasten.train.trainer import CHECKPOINT, Trainer, train
from helpers import interrupted_at

CONFIG = Pretraining(
    hidden=32, layers=1, heads=2, kv_heads=1, ffn=48, vocabulary=400, context=256,
    tokens=6_000, batch_tokens=512, precision="fp32",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(CONFIG, folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_exports_a_hugging_face_folder(finished: Path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    assert model.config.model_type == "llama"
    assert model.dtype == torch.bfloat16
    assert tokenizer.decode(tokenizer("Add 12 and 7.")["input_ids"]) == "Add 12 and 7."
    assert len(tokenizer("1234")["input_ids"]) == 4  # every digit is a token
    summary = json.loads((finished / "training.json").read_text())
    assert summary["tokens"] >= CONFIG.tokens - CONFIG.batch_tokens
    assert not (finished / CHECKPOINT).exists()


def test_an_interrupted_run_ends_in_the_same_weights(finished: Path, tmp_path: Path):
    with interrupted_at(5):
        train(CONFIG, tmp_path)
    assert (tmp_path / CHECKPOINT).exists()
    summary = train(CONFIG, tmp_path)
    whole, resumed = weights(finished), weights(tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert summary["data_sha256"] == json.loads((finished / "training.json").read_text())["data_sha256"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Trainer, "step", lambda self, batch: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, tmp_path)
    with pytest.raises(UserError, match="another lr"):
        train(replace(CONFIG, lr=1e-4), tmp_path)
    with pytest.raises(UserError, match="exists"):
        train(CONFIG, tmp_path, resume=False)
    (tmp_path / CHECKPOINT).write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot read"):
        train(CONFIG, tmp_path)


def test_a_drafter_shares_the_tokenizer(finished: Path, tmp_path: Path):
    train(replace(CONFIG, hidden=16, tokens=1_000, tokenizer_of=str(finished)), tmp_path)
    one, other = (AutoTokenizer.from_pretrained(folder) for folder in (finished, tmp_path))
    assert one.get_vocab() == other.get_vocab()


def test_batches_are_deterministic_and_from_the_train_split():
    encode = lambda text: list(text.encode())  # noqa: E731
    make = lambda: Mixture(encode, 0, batch_tokens=2048, context=2048, seed=3, weights={"copy": 1, "addition": 1})  # noqa: E731
    first, again = make().pool(2, 0.5), make().pool(2, 0.5)
    assert len(first) >= 10
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.labels, other.labels)
        assert one.ids.numel() <= 2048
    for batch in first:
        for ids, labels in zip(batch.ids.tolist(), batch.labels.tolist(), strict=True):
            answer = next(i for i, label in enumerate(labels) if label != IGNORE)
            prompt = bytes(ids[:answer]).decode()
            assert prompt.endswith("Answer:") and split_of(prompt) == "train"
            kept = [label for label in labels if label != IGNORE]
            assert kept == ids[answer : answer + len(kept)] and kept[-1] == 0


def test_answers_are_as_short_as_asked():
    encode = lambda text: list(text.encode())  # noqa: E731
    make = lambda **weights: Mixture(encode, 0, batch_tokens=512, context=512, seed=3, answers=20, weights=weights)  # noqa: E731
    # Sums are worked out in more characters than that, so that only copying is left.
    for batch in make(copy=1, addition=0.2).pool(0, 1.0)[:8]:
        lengths = (batch.labels != IGNORE).sum(1) - 1
        assert lengths.max() <= 20
        assert all(bytes(ids).startswith(b"Copy") for ids in batch.ids.tolist())
    with pytest.raises(UserError, match="at most 20 tokens"):
        make(addition=1).pool(0, 1.0)


def test_schedule():
    rates = [CONFIG.learning_rate(progress / 100) for progress in range(101)]
    assert rates[2] == pytest.approx(CONFIG.lr)
    assert rates[100] == pytest.approx(CONFIG.lr * CONFIG.final_lr)
    assert all(a >= b for a, b in itertools.pairwise(rates[2:]))
    assert CONFIG.difficulty(0) == SHORT and CONFIG.difficulty(CONFIG.curriculum) == pytest.approx(1)
