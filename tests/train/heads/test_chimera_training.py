"""Training of Chimera: what it learns is what is drafted, no row sees what comes, and it is worth something."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from chimera_reference import ChimeraReference
from hasten import LLM, SamplingParams
from hasten.errors import Interrupted, UserError
from hasten.methods.heads.chimera_weights import ChimeraWeights
from hasten.model.checkpoint import resolve
from hasten.train.heads.chimera import ChimeraNetwork, ChimeraRecipe
from hasten.train.heads.recipe import Dialogues, HeadBatch
from hasten.train.trainer import train
from helpers import apart, stopped_at


def recipe(folder: Path, **settings: object) -> ChimeraRecipe:
    defaults = {"parent": "tiny", "data": str(folder), "tokens": 4000, "batch_tokens": 512, "heads": 3, "lr": 3e-3}
    return ChimeraRecipe(**{**defaults, "width": 32, "ffn": 64, **settings})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def network(folder: Path) -> ChimeraNetwork:
    """With weights that are not zero."""
    made, _ = recipe(folder).begin(folder)
    noise = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        # As they are stored.
        parameter.data = (parameter + 0.02 * torch.randn(parameter.shape, generator=noise)).bfloat16().float()
    return made


@pytest.fixture(scope="module")
def batch(folder: Path) -> HeadBatch:
    """Two dialogues."""
    data = Dialogues(folder, ChimeraRecipe.states)
    return data.batch(data.trained[:2])


@torch.inference_mode()
def test_what_is_trained_is_what_is_drafted(
    folder: Path, network: ChimeraNetwork, batch: HeadBatch, tmp_path: Path
) -> None:
    """At every level, against all rows side by side in transformers' layer."""
    recipe(folder, store="bf16").export(network, tmp_path)
    tiny = LlamaForCausalLM.from_pretrained(resolve("tiny"), dtype=torch.float32)
    hidden = tiny.config.hidden_size
    head_dim = hidden // tiny.config.num_attention_heads
    weights = ChimeraWeights.load(tmp_path, hidden, tiny.config.vocab_size, head_dim)
    # The states that are kept are rounded.
    texts = [batch.ids[batch.dialogue == number] for number in (0, 1)]
    states = torch.cat([tiny.model(text[None]).last_hidden_state[0] for text in texts])
    batch = replace(batch, states=states[:, None])
    reference, context = ChimeraReference(tiny, weights), network.context(batch)
    for number in (0, 1):
        first = int((batch.dialogue == number).nonzero()[0])
        rows = [int(row) for row in batch.ahead(4) if batch.dialogue[row] == number]
        for row in (rows[0], rows[-1]):
            text, path = batch.ids[first : row + 2].tolist(), batch.ids[row + 2 : row + 4].tolist()
            for level, expected in enumerate(reference.logits(text, path)):
                said = network.logits(level, context, batch, torch.tensor([row]))[0]
                assert apart(said, expected) < 1e-5


def test_no_row_sees_what_comes(network: ChimeraNetwork, batch: HeadBatch) -> None:
    """A level knows the tokens above it, and no state behind the row from which it drafts."""
    row = int(batch.ahead(4)[3])
    before = network.context(batch)
    other = replace(batch, ids=batch.ids.clone(), states=batch.states.clone())
    other.ids[row + 3] += 1
    other.states[row + 1] += 1
    after = network.context(other)
    assert torch.equal(before[row, :2], after[row, :2])
    assert not torch.equal(before[row, 2], after[row, 2])
    assert not torch.equal(before[row + 1], after[row + 1])


def test_answers_of_a_token_or_two(folder: Path, network: ChimeraNetwork) -> None:
    """There is nothing to draft at the deeper levels, or at all."""
    for answer in (1, 2):
        answers = torch.tensor([False] * 3 + [True] * answer)
        rows = torch.arange(len(answers))
        batch = HeadBatch(
            rows + 5, answers, torch.zeros_like(rows), torch.randn(len(rows), 1, network.embedding.shape[1])
        )
        loss = recipe(folder).loss(network, batch, 0.0, torch.Generator())
        assert loss.isfinite() and (loss > 0) == (answer == 2)


def test_trained_it_saves_passes_and_changes_nothing(folder: Path, tmp_path: Path) -> None:
    llm, data = LLM("tiny", dtype="float32"), Dialogues(folder, ChimeraRecipe.states)
    held = [data.batch([number]) for number in data.held_out[:12]]
    prompts = [each.ids[~each.answers].tolist() for each in held]
    asked = SamplingParams(max_tokens=40)
    plain = llm.generate(prompts, asked, "plain")

    def tokens_per_step(heads: Path, tree: str) -> float:
        ours = llm.generate(prompts, asked, f"chimera:head={heads},tree={tree},sized=false")
        assert [each.token_ids for each in ours] == [each.token_ids for each in plain]
        done = [each.choices[0].statistics for each in ours]
        return sum(each.tokens for each in done) / sum(each.steps for each in done)

    train(recipe(folder, tokens=30_000, heads=2), tmp_path / "heads")
    train(recipe(folder, tokens=1, heads=2, lr=1e-9), tmp_path / "untrained")
    for tree in ("dynamic", "static"):
        assert tokens_per_step(tmp_path / "heads", tree) > 1.1 * tokens_per_step(tmp_path / "untrained", tree)


def test_interrupted_and_resumed_it_is_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(recipe(folder), whole)
    with stopped_at(5, lambda: signal.raise_signal(signal.SIGINT), Interrupted):
        train(recipe(folder), cut)
    train(recipe(folder), cut)
    for name in ("model.safetensors", "config.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()


def test_what_cannot_be_asked(folder: Path) -> None:
    for settings, told in (({"ffn": 40}, "multiple of 16"), ({"width": 0}, "positive"), ({"store": "q2"}, "store")):
        with pytest.raises(UserError, match=told):
            recipe(folder, **settings)
