"""The oracle sees exactly what each row may see, through the real cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.cache import Cache
from hasten.model import CanvasOracle, DiffusionConfig, OracleModel, Rows, Span


def last_two(history: tuple[int, ...]) -> Tensor:
    return torch.tensor([float(token) for token in (0, *history)[-2:]], dtype=torch.float64)


def test_rows_see_their_histories() -> None:
    seen: list[tuple[int, ...]] = []

    def law(history: tuple[int, ...]) -> Tensor:
        seen.append(history)
        return last_two(history)

    oracle = OracleModel(law, 2)
    cache = Cache(oracle.config.layers, oracle.cache_dtype, oracle.device)
    one, other = cache.sequence(), cache.sequence()
    oracle.forward(Rows.of(one, [5, 6], 0))
    one.commit(2)
    # A tree 7 -> (8, 9) behind 5, 6, and a chain of its own beside it.
    tree = torch.tensor([[True, False, False], [True, True, False], [True, False, True]])
    rows = Rows(
        torch.tensor([7, 8, 9, 1, 2]),
        torch.tensor([2, 3, 3, 0, 1]),
        [Span(one, 0, 3, tree), Span(other, 3, 5)],
    )
    seen.clear()
    logits = oracle.forward(rows)
    assert seen == [(5, 6, 7), (5, 6, 7, 8), (5, 6, 7, 9), (1,), (1, 2)]
    assert logits.dtype == torch.float32
    assert logits.tolist() == [[6, 7], [7, 8], [7, 9], [0, 1], [1, 2]]
    assert oracle.forward(rows, wanted=[2, 0]).tolist() == [[7, 9], [6, 7]]
    assert oracle.forward(rows, wanted=[]).shape == (0, 2)
    one.commit([0, 2])
    assert oracle.forward(Rows.of(one, [3], 4)).tolist() == [[9, 3]]
    assert seen[-1] == (5, 6, 7, 9, 3)


@pytest.mark.parametrize(("alignment", "shift"), [("same", 0), ("shifted", 1)])
def test_rows_of_a_canvas_see_places_and_tokens(alignment: str, shift: int) -> None:
    """Committed slots out of order, a block that sees itself, and one under a mask."""
    seen: list[tuple[tuple[tuple[int, int], ...], int]] = []

    def law(visible: tuple[tuple[int, int], ...], position: int) -> Tensor:
        seen.append((visible, position))
        return torch.tensor([float(len(visible)), float(position)])

    oracle = CanvasOracle(law, 2, DiffusionConfig("full", alignment, 1))  # type: ignore[arg-type]
    cache = Cache(oracle.config.layers, oracle.cache_dtype, oracle.device)
    one, other = cache.sequence(), cache.sequence()
    oracle.forward(Rows(torch.tensor([5, 6]), torch.tensor([3, 0]), [Span(one, 0, 2, "all")]), wanted=[])
    one.commit(2)
    assert seen == []
    mask = torch.tensor([[True, False], [True, True]])
    rows = Rows(
        torch.tensor([7, 1, 8, 9]), torch.tensor([1, 2, 4, 4]), [Span(one, 0, 2, "all"), Span(other, 2, 4, mask)]
    )
    block = ((0, 6), (1, 7), (2, 1), (3, 5))
    expected = [(block, 1), (block, 2), (((4, 8),), 4), (((4, 8), (4, 9)), 4)]
    logits = oracle.forward(rows)
    assert seen == [(visible, position + shift) for visible, position in expected]
    assert logits.tolist() == [[len(visible), position + shift] for visible, position in expected]
    assert oracle.config.diffusion is not None
