"""The likeliest of rows of logits: those of PyTorch, the first of equal ones first, whatever stands in a row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.model import ranking
from hasten.model.ranking import rank


@pytest.fixture(params=["native", "composed"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "composed":
        monkeypatch.setattr(ranking, "library", lambda: None)
    elif ranking.library() is None:
        pytest.skip("the native step was not built: no C++ compiler")
    return str(request.param)


def drawn(*shape: int) -> Tensor:
    return 4 * torch.randn(shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("words", [1, 5, 16, 1000, 8191])
@pytest.mark.parametrize("most", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_the_largest(either: str, words: int, most: int, dtype: torch.dtype) -> None:
    logits = drawn(2, 3, words).to(dtype)
    values, places, masses = rank(logits, most)
    assert values.shape == places.shape == (2, 3, min(most, words)) and masses.shape == (2, 3)
    assert torch.equal(values, logits.float().topk(min(most, words), -1).values)
    assert torch.equal(logits.float().gather(-1, places), values)
    assert torch.allclose(masses, logits.double().logsumexp(-1).float(), rtol=1e-5)


def test_of_equal_ones_the_first_comes_first() -> None:
    if ranking.library() is None:
        pytest.skip("the native step was not built: no C++ compiler")
    assert rank(torch.tensor([[1.0, 3, 2, 3, 3, 2]]), 4)[1].tolist() == [[1, 3, 4, 2]]


def test_what_is_refused_is_the_last(either: str) -> None:
    values, places, masses = rank(torch.tensor([[-torch.inf, 0.5, -torch.inf, 2.0]]), 3)
    assert places[0, :2].tolist() == [3, 1] and values[0, 2] == -torch.inf
    assert masses[0] == pytest.approx(torch.tensor([0.5, 2.0]).logsumexp(0).item(), rel=1e-5)


def test_columns_of_a_larger_table(either: str) -> None:
    table = drawn(4, 60)
    for part in (table[:, 10:30], table.T[:20], table[:0]):
        assert torch.equal(rank(part, 3)[0], part.topk(3, -1).values)


def test_rows_that_are_not_finite_give_no_probability(either: str) -> None:
    logits = drawn(2, 40)
    logits[0, 7] = torch.nan
    values, _, masses = rank(logits, 3)
    assert torch.exp(values[0] - masses[0]).isnan().any() and torch.exp(values[1] - masses[1]).isfinite().all()
