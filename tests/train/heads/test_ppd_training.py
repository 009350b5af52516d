"""Training of prompt tokens: at the right places, resumable, and worth something."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from hasten import LLM, SamplingParams
from hasten.errors import Interrupted, UserError
from hasten.methods.heads.ppd import PromptTokens
from hasten.train.heads.dialogues import Dialogue, Writing, write_dialogues
from hasten.train.heads.inserted import TextBatch, Texts, batches
from hasten.train.heads.ppd import PPDRecipe
from hasten.train.heads.recipe import DIALOGUES
from hasten.train.trainer import train
from helpers import apart, stopped_at


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dialogues of `tiny`."""
    made = tmp_path_factory.mktemp("data")
    write_dialogues(LLM("tiny", dtype="float32"), made / DIALOGUES, Writing(count=160, answer=40))
    return made


def recipe(folder: Path, **settings: object) -> PPDRecipe:
    usual = {"parent": "tiny", "data": str(folder), "tokens": 4000, "batch_tokens": 512, "precision": "fp32"}
    return PPDRecipe(**{**usual, "places": 8, **settings})  # type: ignore[arg-type]


def test_places_are_those_where_all_that_is_asked_for_is_the_models_own():
    """Prompts of 3, 2 and 1 tokens: from the last token of each on, as far as the answer goes."""
    batch = TextBatch.of([Dialogue([1, 2, 3], [4, 5, 6, 7]), Dialogue([1, 2], [3]), Dialogue([1], [2, 3, 4])])
    assert batch.bounds == [0, 7, 10, 14] and batch.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 1, 2, 3, 4]
    assert [list(each) for each in batch.places(2)] == [[2, 3], [], [0]]
    assert [list(each) for each in batch.places(3)] == [[2], [], []]


def test_teacher_and_prompts_speak_of_the_same_tokens(folder: Path):
    """The target's own rows, and rows of prompts that are the tokens which really follow: then both say the same."""
    run = recipe(folder, prompts=2)
    network, texts = run.begin(folder)
    batch = TextBatch.of([next(each for each in texts.held_out if len(each.answer) > 5)])
    place = batch.places(2)[0][1]
    embedding = network.target.model.embedding
    network.vectors.data = embedding[batch.ids[place + 1 : place + 3]].unsqueeze(1).clone()
    taught, said = run.said(network, batch, [[place]])
    assert apart(taught, said) < 1e-5
    assert taught[0].argmax(-1).tolist() == batch.ids[place + 2 : place + 4].tolist()


def test_trained_vectors_save_passes_and_change_nothing(folder: Path, tmp_path: Path):
    llm = LLM("tiny", dtype="float32")
    prompts = [each.prompt for each in Texts(folder).held_out]
    asked = SamplingParams(max_tokens=40)
    plain = llm.generate(prompts, asked, "plain")

    def tokens_per_step(vectors: Path) -> float:
        ours = llm.generate(prompts, asked, f"ppd:sized=false,head={vectors}")
        assert [each.token_ids for each in ours] == [each.token_ids for each in plain]
        done = [each.choices[0].statistics for each in ours]
        return sum(each.tokens for each in done) / sum(each.steps for each in done)

    summary = train(recipe(folder, tokens=30_000, places=16), tmp_path / "ppd")
    train(recipe(folder, tokens=1, lr=1e-9), tmp_path / "untrained")
    assert summary["parameters"] == 3 * 256
    assert tokens_per_step(tmp_path / "ppd") > 1.1 * tokens_per_step(tmp_path / "untrained")
    table = PromptTokens.load(tmp_path / "ppd", 256).accuracy
    assert len(table) == 3 and all(0 < sum(ranks) <= 1 for ranks in table)


def test_interrupted_and_resumed_they_are_the_same_bytes(folder: Path, tmp_path: Path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(recipe(folder, ensemble=2), whole)
    with stopped_at(3, lambda: signal.raise_signal(signal.SIGINT), Interrupted):
        train(recipe(folder, ensemble=2), cut)
    # The target is no part of what is kept.
    assert (cut / "training.pt").stat().st_size < 100_000
    train(recipe(folder, ensemble=2), cut)
    for name in ("adapter_model.safetensors", "adapter_config.json", "config.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()


def test_a_batch_whose_answers_are_too_short_teaches_nothing(folder: Path):
    run = recipe(folder)
    network, _ = run.begin(folder)
    loss = run.loss(network, TextBatch.of([Dialogue([1, 2], [3])]), 0.0, torch.Generator())
    loss.backward()
    assert loss == 0 and network.vectors.grad is not None and not network.vectors.grad.any()


def test_batches_have_whole_dialogues_in_order():
    some = [Dialogue([1] * length, [2]) for length in (3, 4, 9, 1)]
    assert [batch.bounds for batch in batches(some, 9)] == [[0, 4, 9], [0, 10], [0, 2]]


@pytest.mark.parametrize("settings", [{"prompts": 0}, {"places": 0}, {"ensemble": 0}, {"precision": "int8"}])
def test_what_cannot_be_trained(folder: Path, settings: dict[str, object]):
    with pytest.raises(UserError):
        recipe(folder, **settings)


def test_the_card_says_how_often_each_rank_was_right(folder: Path, tmp_path: Path):
    train(recipe(folder, tokens=1), tmp_path / "ppd")
    config = json.loads((tmp_path / "ppd" / "config.json").read_text())
    assert config["target"] == "tiny" and [len(ranks) for ranks in config["accuracy"]] == [10, 10, 10]
