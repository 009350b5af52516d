"""Rows beside texts: what they are and where gradients come to, against transformers with one mask over all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.engine import SoftRows
from hasten.errors import UserError
from hasten.model import load_model
from hasten.train.heads.frozen import Frozen, Inserted
from hasten.train.heads.inserted import standing
from helpers import apart

IDS = [[5, 9, 60, 31, 7], [8, 8, 41, 3, 77, 20, 11]]
PLACES = [[1, 3], [4]]
SOFT = SoftRows(
    torch.zeros(4, 1), (1, 1, 2, 2), torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]) > 0
)


def inserted(vectors: torch.Tensor) -> Inserted:
    return Inserted(0, lambda states: vectors.repeat(3, 1), *standing([5, 7], PLACES, SOFT))


def test_groups_see_the_text_up_to_their_place_and_their_own():
    positions, bounds, sees = standing([3, 2], [[0, 1], []], SoftRows(torch.zeros(2, 1), (1, 2), torch.ones(2, 2) > 0))
    assert positions.tolist() == [1, 2, 2, 3] and bounds == [0, 4, 4]
    assert sees[0].int().tolist() == [
        [1, 0, 0, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 1],
        [1, 1, 0, 0, 0, 1, 1],
    ]
    assert sees[1].shape == (0, 2)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
def test_states_and_gradients_are_those_of_transformers(make_checkpoint: Callable[..., Any], architecture: str):
    settings = {"sliding_window": 3} if architecture == "mistral" else {}
    made = make_checkpoint(architecture, **settings)
    frozen = Frozen.load(str(made.folder), "float32")
    noise = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, 48, generator=noise).requires_grad_()
    ids = torch.tensor([token for text in IDS for token in text])
    texts, beside = frozen.read(ids, [0, 5, 12], inserted(vectors))
    goal = torch.randn(12, 97, generator=noise)
    (frozen.logits(beside) * goal).sum().backward()
    gradient, vectors.grad = vectors.grad, None

    window, start, row = settings.get("sliding_window", 99), 0, 0
    for text, places in zip(IDS, PLACES, strict=True):
        count = len(text) + 4 * len(places)
        visible = torch.eye(count).bool()
        at = [*range(len(text)), *(place + ahead for place in places for ahead in SOFT.ahead)]
        for i in range(count):
            for j in range(count):
                if i < len(text):
                    sees = j <= i
                else:
                    group, own = divmod(i - len(text), 4)
                    other, its = divmod(j - len(text), 4)
                    sees = j <= places[group] if j < len(text) else group == other and bool(SOFT.sees[own, its])
                visible[i, j] = sees and at[i] - at[j] < window
        words = made.reference.model.embed_tokens(torch.tensor(text))
        mask = torch.zeros(count, count).masked_fill_(~visible, torch.finfo(torch.float32).min)
        expected = made.reference.model(
            inputs_embeds=torch.cat([words, *[vectors] * len(places)])[None],
            attention_mask=mask[None, None],
            position_ids=torch.tensor([at]),
        ).last_hidden_state[0]
        stop, end = start + len(text), row + 4 * len(places)
        assert apart(texts[start:stop], expected[: len(text)]) < 1e-5
        assert apart(beside[row:end], expected[len(text) :]) < 1e-5
        (made.reference.lm_head(expected[len(text) :]) * goal[row:end]).sum().backward()
        start, row = stop, end
    assert gradient is not None and vectors.grad is not None and apart(gradient, vectors.grad) < 1e-5
    assert not texts.requires_grad


def test_other_layers_are_refused(make_checkpoint: Callable[..., Any]):
    model = load_model(make_checkpoint("llama").folder, "float32", backend="torch")
    model.layers[1].mlp = object()
    with pytest.raises(UserError, match="attention and gated MLPs"):
        Frozen(model)


def test_a_copy_of_what_is_trained_shares_it(make_checkpoint: Callable[..., Any], tmp_path: Path):
    from copy import deepcopy

    frozen = Frozen.load(str(make_checkpoint("llama").folder), "float32")
    assert deepcopy([frozen])[0] is frozen
