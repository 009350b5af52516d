"""Training of hidden transfer's maps: what they are asked for, resumable, and worth something."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from hasten import LLM, SamplingParams
from hasten.errors import Interrupted, UserError
from hasten.methods.heads.hidden_transfer import Transfer
from hasten.train.heads.dialogues import Writing, write_dialogues
from hasten.train.heads.hidden_transfer import TransferRecipe
from hasten.train.heads.inserted import TextBatch, Texts
from hasten.train.heads.recipe import DIALOGUES
from hasten.train.trainer import train
from helpers import stopped_at


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dialogues of `tiny`."""
    made = tmp_path_factory.mktemp("data")
    write_dialogues(LLM("tiny", dtype="float32"), made / DIALOGUES, Writing(count=160, answer=40))
    return made


def recipe(folder: Path, **settings: object) -> TransferRecipe:
    usual = {"parent": "tiny", "data": str(folder), "tokens": 3000, "batch_tokens": 512, "precision": "fp32"}
    return TransferRecipe(**{**usual, "places": 8, **settings})  # type: ignore[arg-type]


def test_an_unchanged_state_enters_at_its_own_layer(folder: Path):
    """Maps begin as no change: entering behind all layers but the last, at its own place, it is the row itself."""
    run = recipe(folder, prompts=1, share=0.99)
    network, texts = run.begin(folder)
    batch = TextBatch.of(texts.held_out[:2])
    inserted = run.insert(network, batch, [[3, 5], [4]])
    assert inserted.layer == len(network.target.layers) - 1 and inserted.positions.tolist() == [4, 6, 5]
    states = torch.randn(len(batch.ids), 256, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([3, 5, batch.bounds[1] + 4])
    torch.testing.assert_close(inserted.enter(states), states[rows])
    network.maps.data *= 2
    torch.testing.assert_close(inserted.enter(states), 2 * states[rows])


def test_trained_maps_save_passes_and_change_nothing(folder: Path, tmp_path: Path):
    llm = LLM("tiny", dtype="float32")
    prompts = [each.prompt for each in Texts(folder).held_out]
    asked = SamplingParams(max_tokens=40)
    plain = llm.generate(prompts, asked, "plain")

    def tokens_per_step(maps: Path) -> float:
        ours = llm.generate(prompts, asked, f"hidden-transfer:sized=false,head={maps}")
        assert [each.token_ids for each in ours] == [each.token_ids for each in plain]
        done = [each.choices[0].statistics for each in ours]
        return sum(each.tokens for each in done) / sum(each.steps for each in done)

    summary = train(recipe(folder, tokens=30_000, places=16), tmp_path / "maps")
    train(recipe(folder, tokens=1, lr=1e-12), tmp_path / "untrained")
    assert summary["parameters"] == 3 * 256 * 256
    assert tokens_per_step(tmp_path / "maps") > 1.1 * tokens_per_step(tmp_path / "untrained")
    assert Transfer.load(tmp_path / "maps", 256, 5).layer == 3


def test_interrupted_and_resumed_they_are_the_same_bytes(folder: Path, tmp_path: Path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(recipe(folder), whole)
    with stopped_at(3, lambda: signal.raise_signal(signal.SIGINT), Interrupted):
        train(recipe(folder), cut)
    train(recipe(folder), cut)
    for name in ("model.safetensors", "config.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()


def test_there_must_be_layers_above(folder: Path):
    with pytest.raises(UserError, match="share must be at least 0 and below 1"):
        recipe(folder, share=1.0)


def test_in_bf16_the_loss_is_nearly_the_same(folder: Path):
    losses = []
    for precision in ("fp32", "bf16"):
        run = recipe(folder, precision=precision, prompts=1)
        network, texts = run.begin(folder)
        loss = run.loss(network, TextBatch.of(texts.held_out[:2]), 0.0, torch.Generator().manual_seed(0))
        loss.backward()
        assert network.maps.grad is not None and network.maps.grad.abs().sum() > 0
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
