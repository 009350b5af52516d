"""dParallel's distillation: what is hidden is what a decoder meets, and the student needs fewer passes than before."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten import LLM, SamplingParams
from hasten.errors import UserError
from hasten.train.answers import FILE
from hasten.train.data import Batch, training_examples
from hasten.train.diffusion import card
from hasten.train.diffusion.adapt import Adaptation, Text
from hasten.train.diffusion.corruption import draw_block, two_views
from hasten.train.diffusion.dparallel import Distillation, certainty_loss
from hasten.train.diffusion.fast_dllm_v2 import ComplementaryBlocks
from hasten.train.diffusion.layout import load
from hasten.train.diffusion.losses import mean_cross_entropy
from hasten.train.diffusion.masks import answer_blocks
from hasten.train.diffusion.mdm import MaskedDiffusion
from hasten.train.diffusion.nbdiff import NextBlock
from hasten.train.diffusion.tidar import DraftAndVerify
from hasten.train.tokenizer import load_tokenizer
from hasten.train.trainer import train
from helpers import killed_at

SMALL: dict[str, Any] = {"batch_tokens": 512, "context": 128, "answers": 96, "precision": "fp32"}
MASK = 2048


def save(recipe: Adaptation, folder: Path) -> str:
    """The model of a run that has just begun."""
    folder.mkdir()
    tokenizer = recipe.tokenizer()
    recipe.export(recipe.build(tokenizer), folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=[MaskedDiffusion, NextBlock, DraftAndVerify, ComplementaryBlocks])
def teacher(request: pytest.FixtureRequest, parent: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of each kind, with random weights."""
    settings = SMALL if request.param is MaskedDiffusion else {**SMALL, "block": 4}
    return save(request.param(parent=parent, **settings), tmp_path_factory.mktemp("teacher") / request.param.__name__)


class Knowing:
    """Answers every other question right, in a teacher's place."""

    def __init__(self, recipe: Distillation) -> None:
        self.known = {e.prompt: e.answer for e in training_examples(4 * recipe.prompts, recipe.seed)}
        self.tokenizer = load_tokenizer(Path(recipe.parent))
        self.model = SimpleNamespace(config=SimpleNamespace(max_positions=256))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def generate(self, prompts: list[str], params: object, method: str) -> list[Any]:
        texts = [self.known[prompt] if number % 2 == 0 else " no idea" for number, prompt in enumerate(prompts)]
        return [
            SimpleNamespace(text=text, prompt_token_ids=self.encode(prompt), token_ids=[*self.encode(text), 0])
            for prompt, text in zip(prompts, texts, strict=True)
        ]


def ask(recipe: Distillation, folder: Path) -> dict[str, int]:
    """Half of the answers are right."""
    knowing: Any = Knowing(recipe)
    return recipe.ask(knowing, folder)


def test_right_answers_within_the_lengths_are_the_data(teacher: str, tmp_path: Path):
    recipe = Distillation(parent=teacher, prompts=30, **{**SMALL, "answers": 20})
    assert ask(recipe, tmp_path) == {"asked": 30, "right": 15}
    documents = recipe.stream(recipe.tokenizer(), tmp_path).documents
    assert len(documents) == 15
    for document in documents:
        assert len(document.ids) <= 128 and len(document.ids) - document.answer <= 21 and document.ids[-1] == 0


def test_a_teacher_that_knows_nothing(teacher: str, tmp_path: Path):
    recipe = Distillation(parent=teacher, prompts=2, **{**SMALL, "answers": 8})
    assert recipe.ask(LLM(teacher, dtype="float32"), tmp_path) == {"asked": 2, "right": 0}
    with pytest.raises(UserError, match="answered none of 2 questions right"):
        train(recipe, tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_a_view_is_what_a_decoder_meets(teacher: str, batch: Batch, seed: int, monkeypatch: pytest.MonkeyPatch):
    recipe = Distillation(parent=teacher, block=4, **SMALL)
    calls: list[tuple[Text, Tensor, Tensor]] = []

    def predict(self: Adaptation, model: object, text: Text, hidden: Tensor, wanted: Tensor) -> Tensor:
        calls.append((text, hidden, wanted))
        return torch.zeros(int(wanted.sum()), MASK + 1)

    monkeypatch.setattr(type(recipe.kind), "predict", predict)
    recipe.loss(load(Path(teacher)), batch, 0.0, torch.Generator().manual_seed(seed))
    (text, *one), (_, *other) = calls
    blocks = recipe.blocks(text)
    segment = one[1] | other[1]
    assert not (one[1] & other[1]).any()
    for row in range(len(blocks)):
        number = blocks[row][segment[row]].unique().tolist()
        assert len(number) == 1
        inside = text.answer[row] & (blocks[row] == number[0])
        assert torch.equal(segment[row], inside)
        place = int(inside.nonzero()[0])
        begins = place > 0 and blocks[row, place - 1] != number[0]
        for hidden, wanted in (one, other):
            assert not hidden[row][~text.answer[row] | (blocks[row] < number[0])].any()
            assert hidden[row][text.answer[row] & (blocks[row] > number[0])].all()
            expected = wanted[row].clone()
            if recipe.alignment == "shifted" and begins:
                # The first token of a block comes with the block before.
                expected[place] = False
            assert torch.equal(hidden[row] & inside, expected)


@pytest.mark.parametrize("beta", [0.0, 2.0, 5.0])
def test_the_loss_is_masked_cross_entropy_and_beta_times_the_entropy_of_what_is_right(
    parent: str, batch: Batch, beta: float
):
    recipe = MaskedDiffusion(parent=parent, **SMALL)
    model, text = recipe.build(recipe.tokenizer()).eval(), Text.of(batch, 12, 0)
    model.set_attn_implementation("eager")
    blocks = answer_blocks(text.start, 12, 4, torch.zeros_like(text.start))
    generator = torch.Generator().manual_seed(5)
    segment, later = draw_block(text.answer, (text.labels >= 0).sum(1), blocks, generator)
    views = two_views(segment, generator)

    def predicted(view: torch.Tensor) -> torch.Tensor:
        hidden = text.ids.masked_fill(view | later, MASK)
        with torch.no_grad():
            return model(hidden, attention_mask=torch.zeros(1, 1, 1, 1)).logits[view]

    # What is hidden in the second view is what the model says there: that is right, and what it is to be sure of.
    text.ids[views[1]] = predicted(views[1]).argmax(-1)
    surprise = entropy = 0.0
    for view in views:
        surprise += mean_cross_entropy(predicted(view), text.ids[view]).item()
        right = predicted(view)[predicted(view).argmax(-1) == text.ids[view]]
        log_p = (right / 0.5).log_softmax(-1)
        entropy += -(log_p.exp() * log_p).sum().item() / max(1, len(right))
    assert entropy > 0.1
    loss = certainty_loss(recipe, model, text, blocks, beta, 0.5, torch.Generator().manual_seed(5))
    assert loss.item() == pytest.approx(surprise + beta * entropy, rel=1e-5)


def test_a_run_resumes_to_the_same_weights_in_the_teachers_layout(teacher: str, tmp_path: Path):
    recipe = Distillation(parent=teacher, prompts=30, block=4, tokens=2_000, **SMALL)
    ask(recipe, tmp_path / "whole")
    train(recipe, tmp_path / "whole")
    ask(recipe, tmp_path / "resumed")
    with killed_at(3):
        train(recipe, tmp_path / "resumed", save_every=0)
    train(recipe, tmp_path / "resumed")
    whole, resumed, before = (
        load(folder).state_dict() for folder in (tmp_path / "whole", tmp_path / "resumed", Path(teacher))
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], before[name]) for name in whole)
    raw, given = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "whole", Path(teacher)))
    assert raw == given
    assert LLM(tmp_path / "whole").generate("Copy", SamplingParams(max_tokens=4), "dparallel:block=4")[0].token_ids


@pytest.mark.parametrize("kind", [MaskedDiffusion, NextBlock])
def test_a_student_says_the_same_in_fewer_passes(kind: type[Adaptation], parent: str, tmp_path: Path):
    """Each token of the answers is one of two, 4 to 1: cross-entropy alone leaves half a nat per position for good."""
    rng, prompt, expected = random.Random(0), [5, 6, 7, 8], [*range(100, 107), 0]
    texts = [[rng.choices([token, token + 100], [0.8, 0.2])[0] for token in expected[:-1]] + [0] for _ in range(200)]
    texts = [{"right": True, "prompt_token_ids": prompt, "token_ids": text} for text in texts]
    settings = {**SMALL, "batch_tokens": 256, "lr": 1e-2}
    untrained = save(kind(parent=parent, **SMALL), tmp_path / "untrained")
    answers, steps = {}, {}
    for name, teacher, beta, tokens in (
        ("teacher", untrained, 0.0, 16_000), ("control", "teacher", 0.0, 8_000), ("student", "teacher", 2.0, 8_000)
    ):  # fmt: skip
        recipe = Distillation(parent=str(tmp_path / teacher), block=8, beta=beta, tokens=tokens, **settings)
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE).write_text("".join(json.dumps(line) + "\n" for line in (recipe.origin, *texts)))
        train(recipe, tmp_path / name)
        llm = LLM(tmp_path / name, dtype="float32")
        (answer,) = llm.generate([prompt], SamplingParams(max_tokens=8), "dparallel:block=8")
        answers[name], steps[name] = answer.token_ids, answer.choices[0].steps
    assert answers["teacher"] == answers["student"] == expected
    assert 2 * steps["student"] <= steps["control"] <= steps["teacher"]


def test_teachers_that_do_not_fit(parent: str, tmp_path: Path):
    with pytest.raises(UserError, match="is none"):
        Distillation(parent=parent, **SMALL)
    folder = Path(save(NextBlock(parent=parent, **SMALL), tmp_path / "odd"))
    raw = json.loads((folder / "config.json").read_text())
    raw["diffusion"]["attention"], raw["diffusion"]["alignment"] = "block-causal", "same"
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="block-causal attention and same alignment"):
        Distillation(parent=str(folder), **SMALL)
    for wrong in ({"prompts": 0}, {"block": 0}, {"beta": -1}, {"temperature": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Distillation(**wrong)


def test_the_card_compares_with_the_teacher(parent: str, tmp_path: Path, only_tasks: Callable[..., None]):
    only_tasks("copy", "reverse")
    teacher = save(NextBlock(parent=parent, **SMALL), tmp_path / "teacher")
    recipe = Distillation(parent=teacher, prompts=4, tokens=500, **SMALL)
    folder = tmp_path / "student"
    summary = ask(recipe, folder) | train(recipe, folder)
    written = card.write_card(recipe, folder, summary, "hasten train dparallel --output student", 2)
    document = json.loads((folder / "card.json").read_text())
    own = ["plain", "denoise", "dparallel"]
    assert list(document["decoded"]) == own + [f"teacher, {method}" for method in own]
    assert "2 of 4 questions" in written.read_text()
