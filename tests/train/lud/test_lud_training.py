"""LUD's recipe: one pass is all units, each alone; what is left is an ordinary model, which says more per pass."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from hasten import LLM, SamplingParams
from hasten.errors import Interrupted, UserError
from hasten.methods.drafters.lud import FILE, load_placeholder
from hasten.train.heads.dialogues import Dialogue
from hasten.train.heads.recipe import DIALOGUES, is_held_out
from hasten.train.lines import lines_of
from hasten.train.lud import units
from hasten.train.lud.recipe import Answer, Groups, LexicalUnits, UnitBatch, visible
from hasten.train.trainer import train
from helpers import stopped_at

ANSWERS = [
    Answer([5, 6, 7, 8, 9, 10, 11], 3, (False, True, True, False)),
    Answer([12, 13, 14, 15], 2, (True, False)),
    Answer([16, 17], 1, (False,)),
]


def write(folder: Path, dialogues: list[Dialogue], confidences: list[list[float]]) -> None:
    """A folder of dialogues, and what somebody thought of them."""
    lines = [{"prompt_token_ids": each.prompt, "token_ids": each.answer} for each in dialogues]
    (folder / DIALOGUES).write_text(lines_of([{}, {"dialogues": lines}]))
    (folder / units.FILE).write_text(lines_of([{}, {"confidences": confidences}]))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Of eight prompts, each with an answer of its own that is known once its first token is."""
    folder = tmp_path / "data"
    folder.mkdir()
    dialogues = [Dialogue([100 + number, 50], [*range(10 * number + 200, 10 * number + 208), 0]) for number in range(8)]
    assert not all(map(is_held_out, dialogues))
    write(folder, dialogues, [[0.5, *[0.99] * 8]] * 8)
    return folder


def recipe(parent: str, data: Path, **settings: object) -> LexicalUnits:
    usual = {"data": str(data), "tokens": 500, "batch_tokens": 64, "precision": "fp32"}
    return LexicalUnits(parent=parent, **{**usual, **settings})  # type: ignore[arg-type]


def test_answers_are_what_is_not_held_out_and_sure_where_the_model_was(parent: str, data: Path):
    dialogues = [Dialogue([number, 3], [4, 5, 6]) for number in range(40)]
    write(data, dialogues, [[0.95, 0.4, number / 40] for number in range(40)])
    made = recipe(parent, data, alpha=0.5).answers()
    assert [each.ids[0] for each in made] == [each.ids[0] for each in dialogues if not is_held_out(each)]
    assert all(each.sure == (True, False, each.ids[0] >= 20) and each.answer == 2 for each in made)


def test_groups_written_by_hand(parent: str, data: Path):
    run = recipe(parent, data, placeholders=2, surplus=0.25)
    # The answer 8 9 10 11 has the units 8 9 10 and 11, from its first token on.
    assert run._row(ANSWERS[0], 0) == [(0, 3, 1, 1.0), (0, 3, 2, 1.0)]
    # From the second on: 9 is the first of a unit of two, behind which the answer has one more token.
    assert run._row(ANSWERS[0], 1) == [(0, 4, 1, 1.0), (0, 4, 2, 0.25)]
    assert run._row(ANSWERS[1], 0) == [(0, 2, 1, 0.25)]
    assert run._row(ANSWERS[2], 0) == []
    firsts = torch.randint(3, (3,), generator=torch.Generator().manual_seed(1)).tolist()
    groups = run.groups(ANSWERS, torch.Generator().manual_seed(1))
    for row, each in enumerate(zip(ANSWERS, firsts, strict=True)):
        expected = run._row(*each)
        columns = (column[row].tolist() for column in groups)
        assert list(zip(*columns, strict=True))[: len(expected)] == expected
        assert (groups.number[row, len(expected) :] == -1).all() and not groups.weight[row, len(expected) :].any()
    none = recipe(parent, data, mix=0.0).groups(ANSWERS, torch.Generator())
    assert none.weight.shape == (3, 0)


def test_who_sees_whom():
    groups = Groups(
        torch.tensor([[0, 0, 1, -1]]), torch.tensor([[1, 1, 3, 0]]), torch.tensor([[1, 2, 1, 1]]), torch.ones(1, 4)
    )
    assert visible(3, groups)[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 0],
        [1, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("seed", range(4))
def test_one_pass_is_a_pass_of_its_own_for_every_unit(parent: str, data: Path, seed: int):
    """The loss, by transformers: each text alone, and each unit's placeholders behind the text before it."""
    run = recipe(parent, data, placeholders=3, surplus=0.25, mix=0.7)
    model, _ = run.begin(data)
    place = model.config.vocab_size - 1
    firsts = torch.randint(4, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    own: list[float] = []
    asked: list[tuple[float, float]] = []
    with torch.no_grad():
        for answer, first in zip(ANSWERS, firsts, strict=True):
            logits = model(torch.tensor([answer.ids])).logits[0, :, :place].log_softmax(-1)
            own += [float(logits[at - 1, answer.ids[at]]) for at in range(answer.answer, len(answer.ids))]
            for unit in units.units(answer.sure, 4, first):
                start = answer.answer + unit.start
                text = torch.tensor([answer.ids[:start] + [place] * 3])
                logits = model(text).logits[0, start:, :place].log_softmax(-1)
                for ahead in range(1, min(4, len(answer.ids) - start)):
                    likely = float(logits[ahead - 1, answer.ids[start + ahead]])
                    asked.append((likely, 1.0 if ahead < len(unit) else 0.25))
        loss = run.loss(model, UnitBatch.of(ANSWERS), 0.0, torch.Generator().manual_seed(seed))
    expected = -sum(own) / len(own)
    if asked:
        expected -= 0.7 * sum(value * weight for value, weight in asked) / sum(weight for _, weight in asked)
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_without_placeholders_it_is_ordinary_fine_tuning(parent: str, data: Path):
    run = recipe(parent, data, mix=0.0)
    model, _ = run.begin(data)
    batch = UnitBatch.of(ANSWERS)
    with torch.no_grad():
        logits = model(batch.ids).logits[:, :-1, :-1]
        expected = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100)
        loss = run.loss(model, batch, 0.0, torch.Generator())
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_spans_come_at_once_and_are_right(parent: str, data: Path, tmp_path: Path):
    """What follows a prompt is known: then a pass gives as many tokens as there are placeholders, and one."""
    folder = tmp_path / "model"
    summary = train(recipe(parent, data, tokens=20_000, lr=5e-3), folder)
    assert summary["loss"] < 1.0
    llm = LLM(folder, dtype="float32")
    answers = recipe(parent, data).answers()
    prompts = [each.ids[:2] for each in answers]
    asked = SamplingParams(max_tokens=12)
    plain = llm.generate(prompts, asked, "plain")
    assert [each.token_ids for each in plain] == [each.ids[2:] for each in answers]
    ours = llm.generate(prompts, asked, "lud:beta=0.7")
    assert [each.token_ids for each in ours] == [each.ids[2:] for each in answers]
    steps = sum(each.choices[0].statistics.steps for each in ours)
    # Of nine tokens the first comes alone, then four, then four.
    assert 9 * len(prompts) / steps > 2
    untouched = tmp_path / "untouched"
    train(recipe(parent, data, tokens=1, lr=1e-9), untouched)
    before = LLM(untouched, dtype="float32").generate(prompts, asked, "lud:beta=0.7")
    assert all(each.choices[0].statistics.accepted == 0 for each in before)


def test_what_is_left_is_an_ordinary_model(parent: str, data: Path, tmp_path: Path):
    folder = tmp_path / "model"
    train(recipe(parent, data), folder)
    before, after = (LlamaForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (parent, folder))
    assert after.config.vocab_size == before.config.vocab_size
    assert {name: each.shape for name, each in after.state_dict().items()} == {
        name: each.shape for name, each in before.state_dict().items()
    }
    vector, count = load_placeholder(folder / FILE, 32)
    assert count == 3 and not torch.equal(vector, before.model.embed_tokens.weight.mean(0))
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 2048


def test_interrupted_and_resumed_it_is_the_same_bytes(parent: str, data: Path, tmp_path: Path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(recipe(parent, data), whole)
    with stopped_at(3, lambda: signal.raise_signal(signal.SIGINT), Interrupted):
        train(recipe(parent, data), cut)
    train(recipe(parent, data), cut)
    for name in ("model.safetensors", FILE, "config.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"placeholders": 0}, "placeholders must be between 1 and 16"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"surplus": 1.5}, "surplus between 0 and 1"),
        ({"mix": -1.0}, "mix must not be negative"),
        ({"precision": "int8"}, "precision must be bf16 or fp32"),
    ],
)
def test_what_cannot_be_trained(parent: str, data: Path, settings: dict[str, object], told: str):
    with pytest.raises(UserError, match=told):
        recipe(parent, data, **settings)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tiny-block", "no folder of a Llama that reads from left to right"),
        ("tiny-diffusion", "no folder of a Llama that reads from left to right"),
        ("nowhere", "no checkpoint at 'nowhere'"),
    ],
)
def test_models_that_cannot_be_trained(name: str, data: Path, told: str):
    with pytest.raises(UserError, match=told):
        recipe(name, data)


def test_nothing_to_train_on(parent: str, data: Path, tmp_path: Path):
    write(data, [], [])
    with pytest.raises(UserError, match="too few dialogues"):
        train(recipe(parent, data), tmp_path / "model")
