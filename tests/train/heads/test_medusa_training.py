"""Training of Medusa's heads: on the right tokens, apart from those that are held out, and worth something."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import torch

from hasten import LLM, SamplingParams
from hasten.errors import Interrupted
from hasten.model import Decoder, load_model
from hasten.train.heads.dialogues import Dialogue
from hasten.train.heads.medusa import MedusaNetwork, MedusaRecipe
from hasten.train.heads.recipe import Dialogues, HeadBatch, is_held_out
from hasten.train.trainer import train
from helpers import stopped_at


def recipe(folder: Path, **settings: object) -> MedusaRecipe:
    return MedusaRecipe(**{"parent": "tiny", "data": str(folder), "tokens": 6000, "batch_tokens": 512, **settings})  # type: ignore[arg-type]


def test_rows_that_look_ahead(tiny: Path) -> None:
    """Prompts of 3 and 2 tokens, answers of 3 and 4: from the last token of the prompt on, inside a dialogue."""
    answers = torch.tensor([0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1]).bool()
    batch = HeadBatch(torch.arange(12), answers, torch.tensor([0] * 6 + [1] * 6), torch.zeros(12, 1, 4))
    assert batch.ahead(2).tolist() == [2, 3, 7, 8, 9]
    assert batch.ahead(4).tolist() == [7]
    target = load_model(tiny, "float32")
    assert isinstance(target, Decoder)
    network = MedusaNetwork(target, torch.tensor([4, 5, 11]), 2, 1, shared=False)
    rows, right = network.rows(batch, 0)
    assert rows.tolist() == [2, 3, 7, 8, 9] and right.tolist() == [0, 1, -1, -1, 2]


def test_no_prompt_is_in_both(folder: Path) -> None:
    data = Dialogues(folder, MedusaRecipe.states)
    assert len(data.held_out) > 1 and len(data.trained) > 20
    assert not set(data.held_out) & set(data.trained)
    trained = recipe(folder).pool(data, 0, 0.0)
    held = list(data.batches(data.held_out, 512))
    prompts = [{tuple(ids.tolist()) for batch in each for ids in _prompts(batch)} for each in (trained, held)]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]
    assert is_held_out(Dialogue([1, 2], [3])) == is_held_out(Dialogue([1, 2], [4]))


def _prompts(batch: HeadBatch) -> list[torch.Tensor]:
    return [batch.ids[(batch.dialogue == number) & ~batch.answers] for number in range(int(batch.dialogue.max()) + 1)]


def test_every_pool_has_all_dialogues_in_another_order(folder: Path) -> None:
    data = Dialogues(folder, MedusaRecipe.states)
    one, other, again = (torch.cat([b.ids for b in recipe(folder).pool(data, n, 0.0)]) for n in (0, 1, 0))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(one.sort().values, other.sort().values)


def test_heads_begin_as_the_targets_own(folder: Path) -> None:
    network, data = recipe(folder, heads=1).begin(folder)
    batch = next(data.batches(data.held_out, 512))
    rows = batch.ahead(1)
    says = network.logits(0, network.context(batch), batch, rows).argmax(-1)
    assert (says == batch.ids[rows + 1]).float().mean() > 0.9


def test_trained_heads_save_passes_and_change_nothing(folder: Path, tmp_path: Path) -> None:
    llm = LLM("tiny", dtype="float32")
    data = Dialogues(folder, MedusaRecipe.states)
    prompts = [ids.tolist() for batch in data.batches(data.held_out, 512) for ids in _prompts(batch)]
    asked = SamplingParams(max_tokens=40)
    plain = llm.generate(prompts, asked, "plain")

    def tokens_per_step(heads: Path, tree: str) -> float:
        ours = llm.generate(prompts, asked, f"medusa:head={heads},tree={tree},sized=false")
        assert [each.token_ids for each in ours] == [each.token_ids for each in plain]
        done = [each.choices[0].statistics for each in ours]
        return sum(each.tokens for each in done) / sum(each.steps for each in done)

    summary = train(recipe(folder, tokens=60_000, heads=2, lr=3e-3), tmp_path / "heads")
    train(recipe(folder, tokens=1, heads=2, lr=1e-9), tmp_path / "untrained")
    config = json.loads((tmp_path / "heads" / "config.json").read_text())
    assert summary["parameters"] == 2 * (256 * 256 + 256) + config["vocab_size"] * 256
    for tree in ("dynamic", "static"):
        assert tokens_per_step(tmp_path / "heads", tree) > 1.1 * tokens_per_step(tmp_path / "untrained", tree)


def test_interrupted_and_resumed_they_are_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(recipe(folder), whole)
    with stopped_at(5, lambda: signal.raise_signal(signal.SIGINT), Interrupted):
        train(recipe(folder), cut)
    train(recipe(folder), cut)
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    assert (whole / "config.json").read_bytes() == (cut / "config.json").read_bytes()


def test_words_are_those_that_answers_say_most(folder: Path) -> None:
    data = Dialogues(folder, MedusaRecipe.states)
    words = data.words(50, 2048)
    assert words is not None and words.tolist() == sorted(set(words.tolist())) and len(words) == 50
    said = data.states.tokens[data.states.answers].bincount(minlength=2048)
    others = torch.ones(2048, dtype=torch.bool)
    others[words] = False
    assert said[words].min() >= said[others].max()
    assert data.words(0, 2048) is None and data.words(2048, 2048) is None
