"""The largest logits of rows: as `topk` finds them, natively and without a compiler."""

from __future__ import annotations

import pytest
import torch

from hasten.engine.sampling.native.library import library
from hasten.methods.drafters import runners_up
from hasten.methods.drafters.runners_up import largest


@pytest.fixture(params=["native", "plain"])
def either(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(runners_up, "library", lambda: None)
    elif library() is None:
        pytest.skip("no compiler")


@pytest.mark.parametrize("vocabulary", [5, 97, 255, 640, 2048, 4096 + 32])
def test_largest(either, vocabulary):
    logits = torch.randn(7, vocabulary, generator=torch.Generator().manual_seed(1))
    for count in (1, 4, 5):
        values, ids = largest(logits, count)
        expected = logits.topk(count)
        assert ids.tolist() == expected.indices.tolist()
        assert values.tolist() == expected.values.tolist()


def test_rows_of_a_larger_table(either):
    table = torch.randn(4, 1000, generator=torch.Generator().manual_seed(2))
    part = table[1:3, :700]
    assert largest(part, 3)[1].tolist() == part.topk(3).indices.tolist()


def test_columns(either):
    turned = torch.randn(700, 3, generator=torch.Generator().manual_seed(3)).T
    assert largest(turned, 2)[1].tolist() == turned.topk(2).indices.tolist()


def test_natively_the_first_of_equals_leads():
    if library() is None:
        pytest.skip("no compiler")
    row = torch.zeros(1, 600)
    row[0, [7, 300]] = 1.0
    assert largest(row, 4)[1].tolist() == [[7, 300, 0, 1]]


def test_where_nothing_is_possible_there_are_tokens_all_the_same(either):
    ids = largest(torch.full((2, 400), -torch.inf), 4)[1]
    assert ids.shape == (2, 4) and ((ids >= 0) & (ids < 400)).all()
