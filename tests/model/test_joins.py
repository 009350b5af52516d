"""Rows that enter a pass in its middle, against the pieces composed by hand; the others do not notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hasten.cache import Cache
from hasten.model import Decoder, Join, Rows, Span, Taps, load_model
from hasten.model.native.library import LIBRARY

TEXT = [5, 9, 60, 31]
HIDDEN = 48
SITES = (("output", 2), ("final_norm", 0))
NATIVE = pytest.param("native", marks=pytest.mark.skipif(not LIBRARY.exists(), reason="it was not built"))


def matrices(count: int, seed: int) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    return torch.eye(HIDDEN) + 0.2 * torch.randn(count, HIDDEN, HIDDEN, generator=noise)


def vectors(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


PAIRS = {
    "mapped": (Join(1, matrices(2, 1)), Join(2, matrices(1, 2))),
    "moved": (Join(1, vectors=vectors(2, 1)), Join(2, vectors=vectors(1, 2))),
    "both": (Join(1, matrices(2, 1), vectors(2, 3)), Join(2, matrices(1, 2), vectors(1, 4))),
}
SEES = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 1, 0, 0, 1]]).bool()
"""A root, a node, two rows that are made of the root, and one that is made of the node."""


def read(model: Decoder) -> Any:
    """A sequence that has read the text."""
    sequence = Cache(model.config.layers, model.cache_dtype, model.device).sequence()
    model.forward(Rows.of(sequence, TEXT, 0))
    sequence.commit(len(TEXT))
    return sequence


def together(model: Decoder, one: Join, other: Join) -> tuple[torch.Tensor, Taps]:
    """Two sequences: the first one's rows that join stand in the middle of the pass, the other's at its end."""
    rows = Rows(
        torch.tensor([7, 8, -1, -1, -1, 11, 7, 8, -1, -1, -1]),
        torch.tensor([4, 5, 5, 6, 6, 6, 4, 5, 5, 6, 6]),
        [
            Span(read(model), 0, 6, torch.block_diag(SEES, torch.ones(1, 1)).bool() | (torch.arange(6) == 0)),
            Span(read(model), 6, 11, SEES),
        ],
        torch.full((11, HIDDEN), 9.0),
        joins=[(2, 0, one), (4, 1, other), (8, 6, one), (10, 7, other)],
    )
    taps = Taps(SITES)
    return model.forward(rows, None, taps), taps


def entered(join: Join, state: torch.Tensor) -> torch.Tensor:
    mapped = state.repeat(len(join), 1) if join.matrices is None else join.matrices @ state
    return mapped if join.vectors is None else mapped + join.vectors


@pytest.mark.parametrize("backend", ["torch", NATIVE])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", PAIRS)
def test_they_are_what_the_pieces_make_of_their_source(
    make_checkpoint: Callable[..., Any], kind: str, architecture: str, backend: str
):
    model, (one, other) = load_model(make_checkpoint(architecture).folder, "float32", backend=backend), PAIRS[kind]
    logits, taps = together(model, one, other)
    # By hand: every layer reads all rows, and those that enter are put in their place before it.
    plain = load_model(make_checkpoint(architecture).folder, "float32", backend="torch")
    rows = Rows(torch.tensor([7, 8, 0, 0, 0]), torch.tensor([4, 5, 5, 6, 6]), [Span(read(plain), 0, 5, SEES)])
    step, x = plain.start(rows), plain.embed(rows)
    for layer in plain.layers:
        if layer.index == 1:
            x = torch.cat([x[:2], entered(one, x[0]), x[4:]])
        if layer.index == 2:
            x = torch.cat([x[:4], entered(other, x[1])])
        x = layer.forward(x, step)
    expected = plain.logits(x, None)
    for start in (0, 6):
        torch.testing.assert_close(logits[start : start + 5], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(taps["output", 2][start : start + 5], x, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            taps["final_norm", 0][start : start + 5], plain.norm.forward(x), atol=1e-4, rtol=1e-4
        )


@pytest.mark.skipif(not LIBRARY.exists(), reason="it was not built")
@pytest.mark.parametrize("kind", PAIRS)
def test_other_rows_do_not_notice(make_checkpoint: Callable[..., Any], kind: str):
    """To the bit, wherever the rows that join stand."""
    model = load_model(make_checkpoint("llama").folder, "float32", backend="native")
    logits, _ = together(model, *PAIRS[kind])
    rows = Rows(torch.tensor([7, 8]), torch.tensor([4, 5]), [Span(read(model), 0, 2)])
    alone = model.forward(rows)
    for start in (0, 6):
        assert torch.equal(logits[start : start + 2], alone)
    assert torch.equal(logits[2:5], logits[8:11])


def test_rows_that_are_made_of_nothing():
    with pytest.raises(ValueError, match="need matrices or vectors"):
        Join(1)
