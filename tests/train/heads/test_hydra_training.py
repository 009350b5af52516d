"""Training of Hydra's heads: on what they see, towards what the target says, and worth more than Medusa's."""

from __future__ import annotations

import json
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaModel

from hasten import LLM, SamplingParams
from hasten.catalogue.entries import ASSETS
from hasten.errors import Interrupted
from hasten.methods.heads.hydra_weights import HydraWeights
from hasten.model import load_model
from hasten.train.heads.hydra import HydraRecipe
from hasten.train.heads.medusa import MedusaRecipe
from hasten.train.heads.recipe import Dialogues
from hasten.train.heads.speakers import SpeakerRecipe
from hasten.train.trainer import train
from helpers import apart, stopped_at

WIDTH = 256


def settings(folder: Path, **changed: object) -> dict[str, object]:
    return {"parent": "tiny", "data": str(folder), "tokens": 6000, "batch_tokens": 512, "heads": 2, **changed}


def recipe(folder: Path, **changed: object) -> HydraRecipe:
    return HydraRecipe(**settings(folder, **changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", [True, False])
def test_the_loss_is_the_papers(folder: Path, monkeypatch: pytest.MonkeyPatch, labels: bool) -> None:
    """Row by row: [state; embeddings of what follows] through the blocks, against the token or the distribution."""
    own = recipe(folder, layers=3, words=40, labels=labels, shared_head=False)
    network, data = own.begin(folder)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    batch = data.batch(data.trained[:3])
    target = load_model("tiny", "float32", backend="torch")
    head, words = target.head.dequant()[network.words], network.words.tolist()
    total = 0.0
    for k, blocks in enumerate(network.blocks):
        losses = []
        for row in batch.ahead(k + 2).tolist():
            if int(batch.ids[row + k + 2]) not in words:
                continue
            z = torch.cat([batch.states[row, 0], *target.embedding[batch.ids[row + 1 : row + k + 2]]])
            x = blocks.carry(z) + F.silu(blocks.mix(z))
            for _ in range(2):
                x = x + F.silu(blocks.block(x))
            said = network.outputs[k](x).log_softmax(-1)
            right = torch.zeros(40)
            right[words.index(int(batch.ids[row + k + 2]))] = 1
            losses.append(-(right if labels else (head @ batch.states[row + k + 1, 0]).softmax(-1)) @ said)
        total += torch.stack(losses).mean().item()
    # Its products are bfloat16's otherwise.
    monkeypatch.setattr(torch, "autocast", lambda *given: nullcontext())
    loss = own.loss(network, batch, 0.0, torch.Generator()).item()
    assert loss == pytest.approx(total, rel=1e-5)


def test_the_prefix_layer_is_a_llamas(folder: Path) -> None:
    """By transformers, from the tensors that are stored."""
    own = recipe(folder, prefix=True)
    network, data = own.begin(folder)
    assert network.prefix is not None
    for parameter in network.prefix.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        # As they are stored.
        parameter.data = parameter.bfloat16().float()
    config = LlamaConfig.from_pretrained(ASSETS / "tiny", num_hidden_layers=1, attn_implementation="eager")
    reference = LlamaModel(config).eval()
    tensors = {name: piece.weight.float() for name, piece in network.prefix.exported("bf16").items()}
    reference.load_state_dict({**tensors, "embed_tokens.weight": reference.embed_tokens.weight})
    batch = data.batch(data.trained[:3])
    with torch.inference_mode():
        context = network.context(batch)
        for number in range(3):
            rows = batch.dialogue == number
            expected = reference(inputs_embeds=batch.states[rows, 0][None]).last_hidden_state[0]
            assert apart(context[rows], expected) < 1e-5


def test_a_prefix_layer_begins_as_one_that_is_not_there(folder: Path) -> None:
    network, data = recipe(folder, prefix=True).begin(folder)
    batch = data.batch(data.trained[:3])
    states, context = batch.states[:, 0], network.context(batch)
    torch.testing.assert_close(F.normalize(context, dim=-1), F.normalize(states, dim=-1), rtol=1e-3, atol=1e-4)
    assert 0.5 < (context.norm() / states.norm()).item() < 2


def test_what_is_trained_is_what_is_stored(folder: Path, tmp_path: Path) -> None:
    summary = train(recipe(folder, layers=2), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    words = config["vocab_size"]
    blocks = 2 * sum((k + 2) * WIDTH * WIDTH + WIDTH for k in range(2)) + 2 * (WIDTH * WIDTH + WIDTH)
    assert summary["parameters"] == blocks + words * WIDTH + words
    assert len(config["accuracy"]) == 2 and config["hydra_num_layers"] == 2 and config["shared_lm_head"]
    weights = HydraWeights.load(tmp_path, WIDTH, words)
    assert weights.layers == 2 and len(weights.outputs) == 1 and weights.outputs[0].stored[0].type == "Q8_0"
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 1.08 * summary["parameters"] + 8000  # 34 bytes for 32 weights; biases, and the header


def test_interrupted_and_resumed_they_are_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(recipe(folder), whole)
    with stopped_at(5, lambda: signal.raise_signal(signal.SIGINT), Interrupted):
        train(recipe(folder), cut)
    train(recipe(folder), cut)
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    assert (whole / "config.json").read_bytes() == (cut / "config.json").read_bytes()


def test_seeing_the_tokens_between_is_worth_more_passes(folder: Path, tmp_path: Path) -> None:
    """The same dialogues, tokens and tree: Hydra's heads save more passes than Medusa's."""
    llm, data = LLM("tiny", dtype="float32"), Dialogues(folder, SpeakerRecipe.states)
    spans = [slice(data.states.bounds[number], data.states.bounds[number + 1]) for number in data.held_out]
    prompts = [data.states.tokens[span][~data.states.answers[span]].tolist() for span in spans]
    asked = SamplingParams(max_tokens=40)
    plain = llm.generate(prompts, asked, "plain")

    def tokens_per_step(spec: str) -> float:
        ours = llm.generate(prompts, asked, f"{spec},nodes=12,sized=false")
        assert [each.token_ids for each in ours] == [each.token_ids for each in plain]
        done = [each.choices[0].statistics for each in ours]
        return sum(each.tokens for each in done) / sum(each.steps for each in done)

    worth = {}
    for slug, kind in (("medusa", MedusaRecipe), ("hydra", HydraRecipe)):
        train(kind(**settings(folder, tokens=120_000, lr=3e-3)), tmp_path / slug)
        worth[slug] = tokens_per_step(f"{slug}:head={tmp_path / slug}")
    assert worth["hydra"] > worth["medusa"] > 1.1


def agreement(weights: HydraWeights, other: HydraWeights, data: Dialogues, embedding: torch.Tensor) -> float:
    """How often the first heads of both say the same, on what was held out."""
    batch = data.batch(data.held_out)
    rows = batch.ahead(2)
    z = torch.cat([batch.states[rows, 0], embedding[batch.ids[rows + 1]]], -1)

    def says(each: HydraWeights) -> torch.Tensor:
        first, output = each.heads[0], each.outputs[0]
        x = F.linear(z, first.carry.weight.float(), first.carry.bias.float())
        x = x + F.silu(F.linear(z, first.mix.weight.float(), first.mix.bias.float()))
        return F.linear(x, output.weight.float(), output.bias.float()).argmax(-1)

    return (says(weights) == says(other)).float().mean().item()


def test_in_few_bytes_heads_say_nearly_the_same(folder: Path, tmp_path: Path) -> None:
    for store in ("bf16", "q8_0", "q4_1"):
        train(recipe(folder, tokens=12_000, store=store), tmp_path / store)
    target, data = load_model("tiny", "float32", backend="torch"), Dialogues(folder, SpeakerRecipe.states)
    plain, eight, four = (HydraWeights.load(tmp_path / store, WIDTH, 2048) for store in ("bf16", "q8_0", "q4_1"))
    assert agreement(plain, eight, data, target.embedding) > 0.97
    assert agreement(plain, four, data, target.embedding) > 0.8
