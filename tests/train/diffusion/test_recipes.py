"""Recipes: what a noised row sees is what a decoder would show it, and runs resume to the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from hasten import LLM
from hasten.errors import UserError
from hasten.tasks import TASKS
from hasten.train.data import Batch
from hasten.train.diffusion import card
from hasten.train.diffusion.adapt import Adaptation, Text
from hasten.train.diffusion.copies import Copies
from hasten.train.diffusion.fast_dllm_v2 import ComplementaryBlocks
from hasten.train.diffusion.layout import load
from hasten.train.diffusion.masks import answer_blocks
from hasten.train.diffusion.mdm import MaskedDiffusion
from hasten.train.diffusion.nbdiff import NextBlock
from hasten.train.diffusion.tidar import DraftAndVerify
from hasten.train.forward import logits
from hasten.train.trainer import train
from helpers import killed_at

SMALL = {"tokens": 6_000, "batch_tokens": 512, "context": 128, "answers": 96, "precision": "fp32"}
MASK = 2048
RECIPES = [MaskedDiffusion, NextBlock, DraftAndVerify, ComplementaryBlocks]


def built(recipe: Adaptation) -> LlamaForCausalLM:
    model = recipe.build(recipe.tokenizer())
    model.set_attn_implementation("eager")
    return model.eval()


def test_text_pads_with_ends_that_count_where_a_text_has_ended(batch: Batch):
    text = Text.of(batch, 11, 0)
    assert text.start.tolist() == [3, 4, 2, 0]
    assert text.answer.long().tolist() == [
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ]
    assert (text.ids[text.answer & (text.labels < 0)] == 0).all()


def test_the_mask_token_begins_as_the_mean(parent: str):
    recipe = MaskedDiffusion(parent=parent, **SMALL)
    tokenizer, model = recipe.tokenizer(), built(recipe)
    assert tokenizer.mask_token_id == MASK and model.config.vocab_size == MASK + 1
    weights = model.get_input_embeddings().weight
    torch.testing.assert_close(weights[MASK], weights[:MASK].mean(0))
    assert model.get_output_embeddings().weight is weights


@pytest.mark.parametrize("recipe", [NextBlock, DraftAndVerify, ComplementaryBlocks])
def test_predictions_are_those_of_one_block_behind_its_context(
    recipe: type[NextBlock] | type[DraftAndVerify] | type[ComplementaryBlocks], parent: str, batch: Batch
):
    """Each block on its own in transformers: finished context, then the block, all of whose rows see both."""
    adapted = recipe(parent=parent, block=4, **SMALL)
    model, text = built(adapted), Text.of(batch, 12, 0)
    hidden = text.answer & (torch.rand(text.answer.shape, generator=torch.Generator().manual_seed(3)) < 0.7)
    hidden[:, 0] = False
    ours = adapted.predict(model, text, hidden, hidden)
    expected = []
    for row, position in hidden.nonzero().tolist():
        aligned = recipe is ComplementaryBlocks
        start = 0 if aligned else int(text.start[row])
        shift = 0 if recipe is DraftAndVerify else 1
        begin = start + (position - start) // 4 * 4
        read = position - shift
        if read < begin and not aligned:
            clean = model(text.ids[row : row + 1, : read + 1]).logits[0, -1]
            expected.append(clean)
            continue
        begin = start + (read - start) // 4 * 4
        stop = min(12, begin + 4)
        ids = text.ids[row, :stop].clone()
        ids[begin:] = ids[begin:].masked_fill(hidden[row, begin:stop], MASK)
        visible = torch.ones(stop, stop, dtype=torch.bool).tril()
        if aligned:
            blocks = torch.arange(stop) // 4
            visible = blocks[None] <= blocks[:, None]
        visible[begin:, begin:] = True
        mask = torch.zeros(1, 1, stop, stop).masked_fill(~visible, torch.finfo(torch.float32).min)
        expected.append(model(ids[None], attention_mask=mask).logits[0, read])
    torch.testing.assert_close(ours, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_masked_diffusion_sees_the_whole_canvas(parent: str, batch: Batch):
    recipe = MaskedDiffusion(parent=parent, **SMALL)
    model, text = built(recipe), Text.of(batch, 12, 0)
    hidden = text.answer & (torch.arange(12) % 2 == 0)
    wanted = hidden & (torch.arange(12) > 5)
    whole = model(text.ids.masked_fill(hidden, MASK), attention_mask=torch.zeros(1, 1, 1, 1)).logits
    torch.testing.assert_close(recipe.predict(model, text, hidden, wanted), whole[wanted], atol=1e-4, rtol=1e-4)


def test_blocks_of_one_token_are_autoregression(parent: str, batch: Batch):
    recipe = NextBlock(parent=parent, **SMALL)
    model, text = built(recipe), Text.of(batch, 10, 0)
    blocks = answer_blocks(text.start, 10, 1, torch.zeros(4, dtype=torch.int64))
    blocks[0] = torch.arange(10)
    hidden = torch.zeros_like(text.answer)
    hidden[0, [4, 7]] = True
    copies = Copies.run(model, text, hidden, blocks, 0, "causal", torch.float32)
    noised, clean = logits(model, copies.noised[0]), logits(model, copies.clean[0])
    visible = ~hidden[0]
    torch.testing.assert_close(noised[visible], clean[visible], atol=1e-5, rtol=1e-5)
    assert (noised[~visible] - clean[~visible]).abs().max() > 1e-2
    plain = model(text.ids[:1]).logits[0]
    torch.testing.assert_close(clean, plain, atol=1e-4, rtol=1e-4)


def test_blocks_grow_by_doubling():
    recipe = NextBlock(block=8, ramp=0.3)
    assert [recipe.block_at(progress) for progress in (0, 0.09, 0.11, 0.19, 0.21, 0.3, 1)] == [1, 1, 2, 2, 4, 8, 8]
    assert NextBlock(ramp=0.0).block_at(0.0) == 8
    with pytest.raises(UserError, match="power of two"):
        NextBlock(block=6)


def test_masked_diffusion_counts_every_token_of_an_answer_once(
    parent: str, batch: Batch, monkeypatch: pytest.MonkeyPatch
):
    """With equal losses everywhere, the mean over steps is one per token, however texts are hidden, padding aside."""
    for sequential in (0.0, 1.0):
        recipe = MaskedDiffusion(parent=parent, sequential=sequential, **SMALL)
        model = built(recipe)
        sizes: list[tuple[int, int]] = []

        def uniform(
            self: MaskedDiffusion, model: object, text: Text, hidden: torch.Tensor, wanted: torch.Tensor,
            sizes: list[tuple[int, int]] = sizes,
        ) -> torch.Tensor:  # fmt: skip
            assert (wanted & ~hidden).sum() == 0 and (hidden & ~text.answer).sum() == 0
            sizes.append((int(text.answer.sum()), int((text.labels >= 0).sum())))
            return torch.zeros(int(wanted.sum()), 2).index_fill_(1, torch.tensor([1]), -1e9).add(0.0)

        monkeypatch.setattr(MaskedDiffusion, "predict", uniform)
        ones = Batch(torch.zeros_like(batch.ids), torch.where(batch.labels >= 0, 0, batch.labels))
        monkeypatch.setattr(
            "hasten.train.diffusion.losses.F.cross_entropy", lambda logits, labels, reduction: torch.ones(len(labels))
        )
        losses = [recipe.loss(model, ones, 0.5, torch.Generator().manual_seed(seed)).item() for seed in range(300)]
        expected = [counted / labelled if sequential == 0 else 1.0 for counted, labelled in sizes]
        assert losses == pytest.approx(expected, rel=1e-5)
        monkeypatch.undo()


def test_complementary_blocks_count_every_token_of_an_answer_once_and_no_padding(
    parent: str, batch: Batch, monkeypatch: pytest.MonkeyPatch
):
    recipe = ComplementaryBlocks(parent=parent, block=4, **SMALL)
    model = built(recipe)
    seen: list[tuple[Text, torch.Tensor, torch.Tensor]] = []

    def sure_of_answers(
        self: ComplementaryBlocks, model: object, text: Text, hidden: torch.Tensor, wanted: torch.Tensor
    ) -> torch.Tensor:
        """Right of what is an answer, wrong of what is padding."""
        seen.append((text, hidden, wanted))
        rows = text.ids.shape[0] // 2
        labelled = Text.of(batch, text.ids.shape[1], 0).labels.repeat(2, 1)
        assert rows == len(batch.ids)
        said = torch.where(labelled >= 0, text.ids, text.ids + 1)
        return 100.0 * torch.nn.functional.one_hot(said[wanted], MASK + 1)

    monkeypatch.setattr(ComplementaryBlocks, "predict", sure_of_answers)
    for seed in range(20):
        loss = recipe.loss(model, batch, 0.5, torch.Generator().manual_seed(seed))
        text, hidden, wanted = seen.pop()
        assert loss.item() == pytest.approx(0, abs=1e-6)
        labelled = Text.of(batch, text.ids.shape[1], 0).labels >= 0
        # Nothing stands before the first position of a text to read it off.
        labelled[:, 0] = False
        assert torch.equal(sum(wanted.long().chunk(2)), labelled.long())
        one, other = hidden.chunk(2)
        padding = text.answer.chunk(2)[0] & ~labelled
        padding[:, 0] = False
        assert padding.any() and torch.equal(one ^ other, one | other) and (one | other)[padding].all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_run_ends_in_the_same_weights(recipe: type[Adaptation], parent: str, tmp_path: Path):
    run = recipe(parent=parent, **SMALL)
    train(run, tmp_path / "whole")
    with killed_at(4):
        train(run, tmp_path / "resumed", save_every=0)
    train(run, tmp_path / "resumed")
    whole, resumed = (load(tmp_path / name).state_dict() for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    start = built(run).bfloat16().state_dict()
    assert any(not torch.equal(whole[name].bfloat16(), start[name]) for name in whole)
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").mask_token_id == MASK


def test_llada_layout_is_the_same_model(parent: str, tmp_path: Path):
    recipe = MaskedDiffusion(parent=parent, **SMALL)
    model = built(recipe)
    recipe.export(built(recipe), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["model_type"] == "llada" and raw["mask_token_id"] == MASK and raw["n_kv_heads"] == 2
    again = load(tmp_path)
    again.set_attn_implementation("eager")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    assert torch.equal(again(ids).logits, model(ids).logits)
    # An adapted model can be a parent; it keeps its mask token.
    recipe.tokenizer().save_pretrained(tmp_path)
    child = MaskedDiffusion(parent=str(tmp_path), **SMALL)
    assert torch.equal(built(child).lm_head.weight, again.lm_head.weight)


@pytest.mark.parametrize("recipe", [NextBlock, DraftAndVerify, ComplementaryBlocks])
def test_block_models_say_how_they_fill_masks(recipe: type[Adaptation], parent: str, tmp_path: Path):
    adapted = recipe(parent=parent, **SMALL)
    adapted.export(built(adapted), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["model_type"] == "llama"
    assert raw["diffusion"] == {
        "attention": adapted.attention, "alignment": adapted.alignment, "mask_token_id": MASK, "block_length": 8,
    }  # fmt: skip


def test_other_architectures_are_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="Llama"):
        load(tmp_path)


def test_masked_accuracy_of_one_who_knows(parent: str, monkeypatch: pytest.MonkeyPatch):
    recipe = MaskedDiffusion(parent=parent, **SMALL)
    tokenizer, model = recipe.tokenizer(), built(recipe)

    def knowing(model: object, text: Text, hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(text.ids[wanted], MASK + 1).float()

    monkeypatch.setattr(MaskedDiffusion, "predict", staticmethod(knowing))
    score = card.masked_accuracy(recipe, model, tokenizer, "reverse", 6)
    (all_right, all_asked, all_answers), (half_right, half_asked, half_answers) = score["hidden"].values()
    assert score["of"] == all_answers == half_answers > 0
    assert all_right == all_asked > half_right == half_asked > 0


def test_card(parent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(card, "TASKS", {name: TASKS[name] for name in ("copy", "reverse")})
    recipe = NextBlock(parent=parent, **{**SMALL, "tokens": 600})
    summary = train(recipe, tmp_path)
    written = card.write_card(recipe, tmp_path, summary, "hasten train nbdiff --output here", 3)
    document = json.loads((tmp_path / "card.json").read_text())
    assert document["tasks"].keys() == {"copy", "reverse"}
    assert written.read_text() == card.render(tmp_path.name, document, recipe)


def test_the_card_says_what_the_parent_could(parent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a model that still reads from left to right, beside it and by length; another one has no such parent."""
    monkeypatch.setattr(card, "TASKS", {name: TASKS[name] for name in ("copy", "reverse")})
    asked: list[tuple[str, str]] = []

    def scores(llm: LLM, per_task: int, report: object, method: str) -> dict[str, object]:
        asked.append((llm.folder.name, method))
        long = 9 if llm.folder.name == "parent" else 2
        figures = {"right": 20 + long, "of": 40, "tokens": 80, "steps": 40, "category": "lists"}
        return {name: {**figures, "by_length": {"0-128": [20, 20], "256-512": [long, 20]}} for name in card.TASKS}

    monkeypatch.setattr("hasten.train.card.task_scores", scores)
    (tmp_path / "parent").symlink_to(parent)
    for kind, expected in (
        (NextBlock, [("child", "plain"), ("child", "nbdiff"), ("parent", "plain")]),
        (MaskedDiffusion, [("child", "threshold")]),
    ):
        asked.clear()
        recipe = kind(parent=str(tmp_path / "parent"), **{**SMALL, "tokens": 600})
        summary = train(recipe, tmp_path / kind.__name__ / "child")
        text = card.write_card(recipe, tmp_path / kind.__name__ / "child", summary, "hasten train", 3).read_text()
        assert asked == expected
        assert ("| `parent, plain` | 100 % of 40 |  | 45 % of 40 |  |" in text) == (kind is NextBlock)
        assert "| 100 % of 40 |  | 10 % of 40 |  |" in text
