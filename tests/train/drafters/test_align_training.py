"""Training of small drafters: they draft for their target, with few words or all, and better by the paper's loss."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from small_drafters import recipe
from transformers import LlamaForCausalLM

from hasten import LLM, SamplingParams
from hasten.errors import Interrupted, UserError
from hasten.methods.drafters.words import TOKEN_MAP
from hasten.model import load_model
from hasten.model.checkpoint import resolve
from hasten.train.drafters.align import AlignRecipe, Measured
from hasten.train.drafters.network import projected
from hasten.train.drafters.sorted import SortedRecipe, best_threshold, first_sure
from hasten.train.heads.recipe import Dialogues
from hasten.train.trainer import train
from helpers import stopped_at


def acceptance(folder: Path) -> float:
    return float(json.loads((folder / "config.json").read_text())["alignment"]["acceptance"][-1])


def tokens_per_step(spec: str, data: Path) -> float:
    """On prompts that were held out, and whatever is drafted, plain decoding's tokens."""
    llm, held = LLM("tiny", dtype="float32"), Dialogues(data, AlignRecipe.states)
    batches = [held.batch([number]) for number in held.held_out]
    prompts = [batch.ids[~batch.answers].tolist() for batch in batches]
    asked = SamplingParams(max_tokens=40)
    plain, ours = (llm.generate(prompts, asked, each) for each in ("plain", spec))
    assert [each.token_ids for each in ours] == [each.token_ids for each in plain]
    done = [each.choices[0].statistics for each in ours]
    return sum(each.tokens for each in done) / sum(each.steps for each in done)


def test_tvd_plus_accepts_more_than_where_it_began(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    settings = {"base": str(pretrained), "opening": 0.0, "tokens": 20_000}
    train(recipe(folder, distance="tvd++", **settings), tmp_path / "aligned")
    before, after = acceptance(pretrained), acceptance(tmp_path / "aligned")
    assert after > 1.1 * before > 0.1


def test_a_drafter_of_few_words_drafts_in_every_method(folder: Path, pretrained: Path) -> None:
    config = json.loads((pretrained / "config.json").read_text())
    words = config[TOKEN_MAP]
    assert len(words) == 400 == config["vocab_size"] - 1 and not (pretrained / "tokenizer.json").exists()
    model = LlamaForCausalLM.from_pretrained(pretrained)
    assert model.lm_head.weight.shape == (401, 48)
    for spec in ("draft-model:confidence=0,length=3,", "dyspec:nodes=8,", "s2d:exits=1/2,length=3,confidence=0,"):
        assert tokens_per_step(f"{spec}model={pretrained}", folder) > 1.05
    with pytest.raises(UserError, match="vocabtrim: this drafter knows few tokens already"):
        LLM("tiny").generate(["a"], method=f"vocabtrim:model={pretrained}")


def test_words_must_be_the_targets(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    for changed, message in (
        ({"target_vocabulary": "x"}, "another tokenizer"),
        ({TOKEN_MAP: [3, 1]}, "400 different tokens in ascending order"),
    ):
        other = tmp_path / message.replace(" ", "-")
        other.mkdir()
        for file in pretrained.iterdir():
            (other / file.name).write_bytes(file.read_bytes())
        config = json.loads((pretrained / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(UserError, match=message):
            LLM("tiny").generate(["a"], method=f"draft-model:model={other}")


def test_a_drafter_of_all_words_is_a_model_by_itself(folder: Path, tmp_path: Path) -> None:
    train(recipe(folder, words=0, tokens=1000), tmp_path / "whole")
    assert LLM(tmp_path / "whole").generate(["a"], SamplingParams(max_tokens=2))[0].token_ids


def test_interrupted_and_resumed_it_is_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    short = recipe(folder, tokens=4000)
    train(short, whole)
    with stopped_at(4, lambda: signal.raise_signal(signal.SIGINT), Interrupted):
        train(short, cut)
    train(short, cut)
    for name in ("model.safetensors", "config.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()


def test_logits_are_those_of_each_dialogue_by_itself(folder: Path) -> None:
    """The network's padded pass, against transformers' model on one dialogue after the other, and behind each exit."""
    network, data = recipe(folder, SortedRecipe, leaves="1/2", batch_tokens=400).begin(folder)
    batch = next(data.batches(data.held_out, 400))
    rows, right = network.rows(batch)
    assert batch.answers[rows + 1].all() and (right < 400).all()
    words = network.words.tolist()
    assert all(number == -1 or words[number] == token for number, token in zip(right, batch.ids[rows + 1], strict=True))
    numbers = torch.where(network.number_of[batch.ids] < 0, 400, network.number_of[batch.ids])
    model, layers = network.model.eval(), list(network.model.model.layers)
    for depth, got in zip((1, 2), network.logits(batch, rows), strict=True):
        model.model.layers = torch.nn.ModuleList(layers[:depth])
        with torch.inference_mode():
            expected = [
                model(numbers[batch.dialogue == each][None], use_cache=False).logits[0]
                for each in range(int(batch.dialogue.max()) + 1)
            ]
        torch.testing.assert_close(got.detach(), torch.cat(expected)[rows, :400], atol=1e-4, rtol=1e-4)
        model.model.layers = torch.nn.ModuleList(layers)


def test_batches_have_all_dialogues_of_like_length(folder: Path) -> None:
    data = Dialogues(folder, AlignRecipe.states)
    one, again = recipe(folder).pool(data, 0, 0.0), recipe(folder).pool(data, 0, 0.0)
    assert one.packed == again.packed != recipe(folder).pool(data, 1, 0.0).packed
    assert sorted(number for packed in one.packed for number in packed) == data.trained
    lengths = [[data.states.bounds[each + 1] - data.states.bounds[each] for each in packed] for packed in one.packed]
    assert sum(map(sum, lengths)) > 0.7 * sum(len(each) * max(each) for each in lengths)


def test_the_first_table_keeps_what_tells_tokens_apart() -> None:
    noise = torch.Generator().manual_seed(0)
    table = torch.randn(60, 4, generator=noise) @ torch.randn(4, 20, generator=noise)
    small = projected(table, 4)
    assert small.shape == (60, 4) and float(small.std()) == pytest.approx(1)
    wide, narrow = torch.pdist(table), torch.pdist(small)
    torch.testing.assert_close(narrow / narrow.mean(), wide / wide.mean(), atol=1e-4, rtol=1e-4)


def test_sorted_training_makes_every_exit_a_drafter(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    train(recipe(folder, SortedRecipe, leaves="1/2", tokens=60_000, lr=1e-2), tmp_path / "sorted")
    config = json.loads((tmp_path / "sorted" / "config.json").read_text())
    first, last = config["alignment"]["acceptance"]
    assert config["exits"] == [1, 2] and len(config["thresholds"]) == 1
    assert first > 0.7 * last > 0.05
    # Trained for its last layer only, a drafter's first one says little.
    plain = recipe(folder, SortedRecipe, leaves="1/2", base=str(pretrained))
    network, data = plain.begin(tmp_path)
    measured = plain.measure(network, load_model(resolve("tiny"), "float32", backend="torch"), data)
    assert first > 1.2 * float(measured[0].overlap.mean())
    assert float(measured[1].overlap.mean()) == pytest.approx(acceptance(pretrained), abs=1e-3)
    assert tokens_per_step(f"s2d:model={tmp_path / 'sorted'},confidence=0,length=4", folder) > 1.03


def test_the_threshold_that_pays() -> None:
    """An exit that is right where it is sure: leaving pays from there on, and nowhere where it costs nothing less."""
    confidence = torch.tensor([0.35, 0.55, 0.75, 0.97])
    first = Measured(confidence, torch.tensor([False, False, True, True]), confidence)
    last = Measured(confidence, torch.ones(4).bool(), confidence)
    assert first_sure([confidence, confidence], [0.6]).tolist() == [1, 1, 0, 0]
    assert best_threshold([first, last], [0.05, 0.2]) in (0.6, 0.7)
    assert best_threshold([last, last], [0.05, 0.2]) == 0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distance": "l2"}, "loss must be one of"),
        ({"opening": 2.0}, "opening must be between"),
        ({"hidden": 50, "attention_heads": 4}, "hidden must be an even multiple"),
        ({"layers": 0}, "must be positive"),
        ({"precision": "fp8"}, "precision must be"),
    ],
)
def test_what_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(Path(), **settings)


def test_exits_that_cannot_be(folder: Path, pretrained: Path) -> None:
    for leaves, message in (("1/3", "must end with 2"), ("2", "ascending"), ("2/1", "ascending")):
        with pytest.raises(UserError, match=message):
            recipe(folder, SortedRecipe, leaves=leaves)
    with pytest.raises(UserError, match="must end with 2"):
        recipe(folder, SortedRecipe, leaves="1/3", base=str(pretrained)).begin(folder)
