"""Medusa-2: the target that learns is the checkpoint that is written, and stays close to what it was."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hasten import LLM, SamplingParams
from hasten.bench.divergence import Divergence, divergence
from hasten.errors import Interrupted, UserError
from hasten.model import Decoder, Rows, load_model
from hasten.model.linear import DenseLinear
from hasten.train.heads.adapted import Adapted, LowRank, write_adapted
from hasten.train.heads.dialogues import Dialogue, read_dialogues
from hasten.train.heads.joint import JointNetwork, JointRecipe
from hasten.train.heads.recipe import DIALOGUES, HeadBatch, is_held_out
from hasten.train.trainer import train
from helpers import stopped_at

IDS = [[5, 9, 60, 31, 7], [8, 8, 41, 3, 77, 20, 11]]


def recipe(folder: Path, **settings: Any) -> JointRecipe:
    given = {"parent": "tiny", "data": str(folder), "tokens": 6000, "batch_tokens": 512, "words": 500, "rank": 8}
    return JointRecipe(**{**given, **settings})


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(adapters: torch.nn.Module) -> None:
    """As if they had learnt something."""
    with torch.no_grad():
        for number, parameter in enumerate(adapters.parameters()):
            parameter += 0.05 * drawn(*parameter.shape, seed=number)


def test_a_matrix_begins_as_it_was_and_each_part_has_a_product_of_its_own() -> None:
    base = DenseLinear(drawn(7, 6), drawn(7, seed=1))
    beside, rows = LowRank(base, (4, 3), 2, 0.5), drawn(5, 6, seed=2)
    assert torch.equal(beside.forward(rows), base.forward(rows))
    moved(beside)
    thin, (one, other) = beside.thin.detach(), beside.wide
    weight = base.weight + 0.5 * torch.cat([one @ thin[:2], other @ thin[2:]])
    expected = rows @ weight.T + base.bias
    torch.testing.assert_close(beside.forward(rows), expected)
    torch.testing.assert_close(beside.forward_add(rows, rows[:, :1]), expected + rows[:, :1])
    torch.testing.assert_close(beside.dequant(), weight)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
def test_what_is_written_is_what_was_trained(
    make_checkpoint: Callable[..., Any], architecture: str, tmp_path: Path
) -> None:
    """By transformers, of the folder."""
    settings = {"sliding_window": 3} if architecture == "mistral" else {}
    parent = make_checkpoint(architecture, **settings).folder
    model = load_model(parent, "float32", backend="torch")
    assert isinstance(model, Decoder)
    adapted = Adapted(model, 4, 0.5)
    moved(adapted)
    states = adapted(torch.tensor([token for text in IDS for token in text]), [0, 5, 12])
    write_adapted(parent, tmp_path, model.config, adapted.added())
    written = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    before = AutoModelForCausalLM.from_pretrained(parent, attn_implementation="eager")
    with torch.no_grad():
        for text, expected in zip(IDS, states.split([5, 7]), strict=True):
            found = written.model(torch.tensor([text])).last_hidden_state[0]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
            assert (before.model(torch.tensor([text])).last_hidden_state[0] - expected).abs().max() > 0.05
    one, other = load_file(parent / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == adapted.added().keys() and one.keys() == other.keys()


def test_a_parent_without_these_matrices_is_refused(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    folder = make_checkpoint("llama").folder
    model = load_model(folder, "float32", backend="torch")
    assert isinstance(model, Decoder)
    added = Adapted(model, 2, 1.0).added()
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"no tensor model\.layers\.0\.mlp\.up_proj\.weight"):
        write_adapted(tmp_path, tmp_path / "new", model.config, added)


@pytest.fixture(scope="module")
def begun(folder: Path) -> tuple[JointNetwork, HeadBatch]:
    network, data = recipe(folder).begin(folder)
    return network, data.batch(data.trained[:4])


def test_it_begins_as_the_target(begun: tuple[JointNetwork, HeadBatch]) -> None:
    network, batch = begun
    with torch.no_grad():
        # The states on disk are bf16.
        torch.testing.assert_close(network.reread(batch).states, batch.states, atol=0.05, rtol=0.02)


def test_only_heads_learn_in_the_opening_and_all_behind_it(folder: Path, begun: tuple[JointNetwork, HeadBatch]) -> None:
    network, batch = begun
    for progress, learns in ((0.1, False), (0.7, True)):
        network.zero_grad()
        recipe(folder).loss(network, batch, progress, torch.Generator()).backward()
        assert all(block.weight.grad is not None for layers in network.blocks for block in layers)
        assert all((wide.grad is not None) == learns for each in network.backbone.adapters for wide in each.wide)
    rate = recipe(folder, lr=1e-3, base_lr=1e-4, warmup=0.0).learning_rate
    assert rate(0.0) == pytest.approx(1e-3) and rate(0.4) == pytest.approx(4e-4)
    network.zero_grad()


def test_the_loss_is_kl_and_what_heads_say_with_the_weight_asked_for(
    folder: Path, begun: tuple[JointNetwork, HeadBatch]
) -> None:
    """In float32, along answers; heads are taught what the target says now."""
    network, batch = begun
    network = recipe(folder).begin(folder)[0]
    moved(network.backbone.adapters)
    own, progress = recipe(folder, heads=4, weight=0.3), 0.7
    with torch.no_grad():
        states = network.reread(batch).states[:, 0]
        rows = [row for row in range(len(batch.ids) - 1) if batch.answers[row + 1]]
        rows = [row for row in rows if batch.dialogue[row] == batch.dialogue[row + 1]]
        was = (batch.states[rows, 0] @ network.head.T).softmax(-1)
        now = (states[rows] @ network.head.T).softmax(-1)
        expected = (was * (was / now).log()).sum(-1).mean()
        assert own.distance(network, batch, network.reread(batch)) == pytest.approx(expected.item(), rel=1e-3)
        said = torch.zeros(())
        for k in range(4):
            at, right = network.rows(replace(batch, states=states[:, None]), k)
            at = at[right >= 0]
            taught = (states[at + k + 1] @ network.teacher.T).softmax(-1)
            said += 0.8**k * F.cross_entropy(network.logits(k, states, batch, at), taught)
    got = own.loss(network, batch, progress, torch.Generator())
    assert got.item() == pytest.approx((expected + said).item(), rel=0.02)

    def gradient(weight: float) -> Tensor:
        network.zero_grad()
        recipe(folder, weight=weight).loss(network, batch, progress, torch.Generator()).backward()
        return network.backbone.adapters[0].thin.grad.clone()  # type: ignore[union-attr, operator]

    alone, little, much = gradient(0.0), gradient(0.1), gradient(0.4)
    # What heads add is in proportion.
    added, more = little - alone, much - alone
    assert more.norm() > 0 and (4 * added - more).norm() < 0.2 * more.norm()


def test_interrupted_and_resumed_it_is_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    whole, cut, own = tmp_path / "whole", tmp_path / "cut", recipe(folder, tokens=4000)
    train(own, whole)
    with stopped_at(5, lambda: signal.raise_signal(signal.SIGINT), Interrupted):
        train(own, cut)
    train(own, cut)
    for name in ("model.safetensors", "heads/medusa/model.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()


def logits_along_answer(llm: LLM, dialogue: Dialogue) -> Tensor:
    """[tokens of the answer, vocabulary], of the rows that say them."""
    sequence = llm.engine.cache.sequence()
    first, stop = len(dialogue.prompt) - 1, len(dialogue.ids) - 1
    logits = llm.model.forward(Rows.of(sequence, dialogue.ids, 0), range(first, stop))
    sequence.release()
    return logits


def along_answers(now: LLM, before: LLM, dialogues: Sequence[Dialogue]) -> Divergence:
    """What `divergence` finds on all rows, on those of answers alone."""
    found = Divergence()
    for each in dialogues:
        found.add(logits_along_answer(before, each), logits_along_answer(now, each))
    return found


def test_the_model_stays_close_and_its_heads_save_passes(folder: Path, tmp_path: Path) -> None:
    train(recipe(folder, tokens=40_000, heads=2, lr=3e-3, base_lr=1e-3, weight=0.1), tmp_path / "joint")
    before, now = LLM("tiny", dtype="float32"), LLM(tmp_path / "joint", dtype="float32")
    held_out = [each for each in read_dialogues(folder / DIALOGUES) if is_held_out(each)]
    # It learns along answers, and there it stays what it was: 218 of 218 rows agree.
    answers = along_answers(now, before, held_out)
    assert answers.nats is not None and 0 < answers.nats / answers.rows < 0.02
    assert answers.agreeing > 0.95 * answers.rows
    # Nothing holds it to what it would say within prompts, 263 of 304; so of all rows 488 of 530 agree. These were
    # 680 of 703 where `tiny`'s template added `Answer:` a second time to the tasks' questions, which it now reads as
    # they are: other dialogues, in whose prompts it happened to move less. Nothing else made the difference.
    found = divergence(now, before, [each.ids for each in held_out])
    assert found.nats is not None and 0 < found.nats / found.rows < 0.1 and found.agreeing > 0.9 * found.rows
    prompts, asked = [each.prompt for each in held_out], SamplingParams(max_tokens=40)
    # Found by itself.
    ours, plain = now.generate(prompts, asked, "medusa:sized=false"), now.generate(prompts, asked, "plain")
    assert [each.token_ids for each in ours] == [each.token_ids for each in plain]
    done = [each.choices[0].statistics for each in ours]
    assert sum(each.tokens for each in done) > 1.2 * sum(each.steps for each in done)
    told = json.loads((tmp_path / "joint" / "heads" / "medusa" / "config.json").read_text())
    assert told["target"] == "joint" and len(told["accuracy"]) == 2


def test_what_cannot_be_asked(folder: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF")
    for settings, told in (
        ({"rank": 0}, "rank must be"),
        ({"opening": 1.0}, "opening must be"),
        ({"base_lr": 0.0}, "base-lr"),
        ({"weight": -1.0}, "weight must not"),
        ({"parent": str(gguf)}, "is a GGUF file"),
    ):
        with pytest.raises(UserError, match=told):
            recipe(folder, **settings)
