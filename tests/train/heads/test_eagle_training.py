"""Training of EAGLE heads: its steps are those of drafting, and what comes of it is worth something."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from hasten import LLM, SamplingParams
from hasten.engine import Target
from hasten.engine.creation import create
from hasten.errors import Interrupted, UserError
from hasten.methods.heads.eagle import Eagle
from hasten.model import Decoder, Rows, Taps, load_model
from hasten.model.checkpoint import resolve
from hasten.model.layers import Attention, GatedMLP
from hasten.train.heads.dialogues import read_dialogues
from hasten.train.heads.eagle import Eagle1Recipe, Eagle3Recipe, EagleRecipe, entering
from hasten.train.heads.recipe import DIALOGUES, Dialogues, HeadBatch
from hasten.train.heads.states import read_states
from hasten.train.trainer import train
from helpers import apart, stopped_at

RECIPES: dict[int, type[EagleRecipe]] = {1: Eagle1Recipe, 3: Eagle3Recipe}


@pytest.fixture(scope="module")
def folder(folder: Path) -> Path:
    """The dialogues that all share, and what EAGLE-3 reads of them."""
    llm = LLM("tiny", dtype="float32")
    taps = Eagle3Recipe.taps(len(llm.model.layers))
    read_states(llm, read_dialogues(folder / DIALOGUES), taps, folder / Eagle3Recipe.states, 10**9)
    return folder


def recipe(version: int, folder: Path, **settings: Any) -> Any:
    given = {"parent": "tiny", "data": str(folder), "tokens": 6000, "batch_tokens": 512, "precision": "fp32"}
    return RECIPES[version](**{**given, **settings})


def by_hand(model: Any, states: Tensor, batch: HeadBatch, row: int, steps: int) -> list[Tensor]:
    """Outputs of the steps from one row on: the text up to there and the head's own chain, token by token."""
    w, shape, start = model.weights, model.shape, int((batch.dialogue < batch.dialogue[row]).sum())
    width, outs = shape.slots.key_width, []

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + model.config.norm_eps).rsqrt() * weight

    def turned(x: Tensor, place: int) -> Tensor:
        angle = place * model.frequencies
        one, other = x.view(-1, width).chunk(2, -1)
        return torch.cat([one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin()], -1)

    keys, values = [], []
    for place in range(row - start + steps):
        token = model.embedding[batch.ids[start + place + 1]]
        own = place > row - start
        state = outs[-1] if own else states[start + place]
        if model.version == 1:
            x = read = w["fusion"] @ torch.cat([token, state])
        else:
            x = state if own else w["fusion"] @ state
            read = torch.cat([norm(token, w["token_norm"]), norm(x, w["mixer_norm"])])
        keys.append(turned(w["key"] @ read, place))
        values.append((w["value"] @ read).view(-1, width))
        if place < row - start:
            continue
        query, group = turned(w["query"] @ read, place), shape.heads // shape.slots.heads
        mixed = []
        for head in range(shape.heads):
            scores = torch.stack([query[head] @ key[head // group] for key in keys]) / width**0.5
            mixed.append(scores.softmax(-1) @ torch.stack([value[head // group] for value in values]))
        x = x + w["attention_out"] @ torch.cat(mixed)
        normed = norm(x, w["mlp_norm"])
        outs.append(x + w["down"] @ (F.silu(w["gate"] @ normed) * (w["up"] @ normed)))
    return outs


def test_the_third_begins_as_the_last_layer_and_the_first_as_one_that_adds_nothing(folder: Path) -> None:
    target = load_model(resolve("tiny"), "float32", backend="torch")
    assert isinstance(target, Decoder)
    last, hidden = target.layers[-1], target.config.hidden_size
    assert isinstance(last.mixer, Attention) and isinstance(last.mlp, GatedMLP)
    third, data = recipe(3, folder).begin(folder)
    own = torch.cat([third.weights[name][:, hidden:] for name in ("query", "key", "value")])
    assert torch.equal(own, last.mixer.qkv.dequant()) and torch.equal(third.weights["down"], last.mlp.down.dequant())
    first, data = recipe(1, folder).begin(folder)
    batch = data.batch(data.trained[:2])
    with torch.no_grad():
        rows, outputs = next(first.roll(entering(first, batch), batch, 1))
        fused = torch.cat([first.embedding[batch.ids[rows + 1]], batch.states[rows, 0]], -1)
        torch.testing.assert_close(outputs, fused @ first.weights["fusion"].T)
    assert all(first.weights[name].std() > 0 for name in ("query", "key", "value", "gate", "up", "fusion"))


@pytest.mark.parametrize("version", RECIPES)
def test_a_step_is_that_of_drafting_token_by_token(folder: Path, version: int) -> None:
    model, data = recipe(version, folder).begin(folder)
    batch = data.batch(data.trained[:3])
    states = entering(model, batch)
    with torch.no_grad():
        for weight in model.weights.values():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
        rolled = [dict(zip(rows.tolist(), outputs, strict=True)) for rows, outputs in model.roll(states, batch, 4)]
        assert len(rolled) == 4 and len(rolled[0]) > len(rolled[3]) > 2
        rows = sorted(rolled[3])
        for row in (rows[0], rows[len(rows) // 2], rows[-1]):
            for got, expected in zip(
                (step[row] for step in rolled), by_hand(model, states, batch, row, 4), strict=True
            ):
                # Random weights make numbers of thousands of it.
                assert apart(got, expected) < 1e-5


def test_the_loss_of_each_step_is_that_of_the_roll_out(folder: Path) -> None:
    """Cross-entropy with what the target's head says of its final state there, of the words that may be drafted."""
    own = recipe(3, folder, words=300)
    model, data = own.begin(folder)
    batch = data.batch(data.trained[:2])
    states = entering(model, batch)
    with torch.no_grad():
        losses = own.losses(model, batch)
        for step, loss in enumerate(losses):
            terms = []
            for row in batch.ahead(step + 2).tolist():
                if model.row_of[batch.ids[row + step + 2]] < 0:
                    continue
                said = (model.head @ batch.states[row + step + 1, -1]).softmax(-1)
                output = by_hand(model, states, batch, row, step + 1)[-1]
                normed = F.rms_norm(output, output.shape, model.weights["norm"], model.config.norm_eps)
                terms.append(-(said * (model.head @ normed).log_softmax(-1)).sum())
            assert len(terms) > 4
            assert loss == pytest.approx(torch.stack(terms).mean().item(), abs=1e-5)
    assert len(losses) == 3


@pytest.mark.parametrize("version", RECIPES)
def test_a_trained_layer_drafts_what_its_training_says(folder: Path, tmp_path: Path, version: int) -> None:
    """The drafter's network makes of a text, by the same states in float32, what the training's makes of it."""
    own = recipe(version, folder, tokens=2000, words=500, store="bf16")
    train(own, tmp_path / "head")
    llm = LLM("tiny", dtype="float32")
    drafter = create(f"eagle:head={tmp_path / 'head'},tree=chain,depth=3,least=0,sized=false", Target(llm.model))
    assert isinstance(drafter, Eagle)
    model, data = own.begin(folder)
    with torch.no_grad():
        for name, parameter in model.weights.items():
            parameter.copy_(_stored(drafter, name))
    batch = data.batch(data.held_out[:1])
    [request] = llm.engine.add(batch.ids.tolist()[:-1], SamplingParams(max_tokens=6, ignore_eos=True), drafter)
    llm.engine.step()
    with torch.no_grad():
        behind = drafter.states([request])[0]
        answers = torch.ones(len(batch.ids) + 1, dtype=torch.bool)
        ids, taps = [*request.tokens, 0], Taps(own.taps(len(llm.model.layers)))
        sequence = llm.engine.cache.sequence()
        llm.model.forward(Rows.of(sequence, ids, 0), [], taps)
        sequence.release()
        states = torch.stack([taps[tap] for tap in own.taps(len(llm.model.layers))], 1)
        longer = HeadBatch(torch.tensor(ids), answers, torch.zeros(len(ids), dtype=torch.int64), states)
        rows, outputs = next(model.roll(entering(model, longer), longer, 1))
    row = len(request.tokens) - 2
    assert apart(outputs[rows.tolist().index(row)], behind) < 1e-5
    llm.engine.abort(request)


@pytest.mark.parametrize("store", ["bf16", "q4_1"])
def test_matrices_are_stored_as_asked_and_norms_are_not_rounded(folder: Path, tmp_path: Path, store: str) -> None:
    train(recipe(3, folder, tokens=1, store=store), tmp_path / "head")
    tensors = load_file(tmp_path / "head" / "model.safetensors")
    vectors = {name for name, each in tensors.items() if each.ndim == 1}
    assert len(vectors) == 4 and all(tensors[name].dtype == torch.bfloat16 for name in vectors)
    blocks = {name for name in tensors if name.endswith(".q4_1")}
    assert blocks == (set() if store == "bf16" else tensors.keys() - vectors)


def _stored(drafter: Eagle, name: str) -> Tensor:
    weights = drafter.eagle.weights
    stored = {"fusion": weights.fusion, "norm": weights.norm, **weights.layer}[name]
    assert stored is not None
    return stored.weight.float()


@pytest.mark.parametrize("version", RECIPES)
def test_trained_heads_save_passes_and_change_nothing(folder: Path, tmp_path: Path, version: int) -> None:
    llm = LLM("tiny", dtype="float32")
    data = Dialogues(folder, RECIPES[version].states)
    batch = data.batch(data.held_out[:6])
    prompts = [batch.ids[(batch.dialogue == number) & ~batch.answers].tolist() for number in range(6)]
    asked = SamplingParams(max_tokens=30)
    plain = llm.generate(prompts, asked, "plain")

    def tokens_per_step(head: Path) -> float:
        ours = llm.generate(prompts, asked, f"eagle:head={head},sized=false,nodes=8,least=0")
        assert [each.token_ids for each in ours] == [each.token_ids for each in plain]
        done = [each.choices[0].statistics for each in ours]
        return sum(each.tokens for each in done) / sum(each.steps for each in done)

    train(recipe(version, folder, tokens=40_000, precision="bf16"), tmp_path / "head")
    train(recipe(version, folder, tokens=1, lr=1e-9), tmp_path / "untrained")
    told = json.loads((tmp_path / "head" / "config.json").read_text())
    assert len(told["accuracy"]) == 4 and all(0 <= share <= 1 for share in told["accuracy"])
    assert tokens_per_step(tmp_path / "head") > 1.03 * tokens_per_step(tmp_path / "untrained")


@pytest.mark.parametrize("version", RECIPES)
def test_interrupted_and_resumed_they_are_the_same_bytes(folder: Path, tmp_path: Path, version: int) -> None:
    whole, cut, own = tmp_path / "whole", tmp_path / "cut", recipe(version, folder, tokens=3000, words=400)
    train(own, whole)
    with stopped_at(4, lambda: signal.raise_signal(signal.SIGINT), Interrupted):
        train(own, cut)
    train(own, cut)
    for name in ("model.safetensors", "config.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()


def test_what_cannot_be_asked(folder: Path) -> None:
    for settings, told in (
        ({"steps": 0}, "between 1 and 8"),
        ({"precision": "fp8"}, "bf16 or fp32"),
        ({"store": "q2_k"}, "store must be"),
    ):
        with pytest.raises(UserError, match=told):
            recipe(3, folder, **settings)
