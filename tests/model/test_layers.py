"""What overflows in PyTorch's norms does not come back as plausible zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hasten.cache import Cache
from hasten.model import Rows, Span, load_model
from hasten.model.layers import overflow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_overflow_is_of_the_squares(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    rows = torch.ones(3, 64, dtype=dtype)
    rows[1] = largest
    found = overflow(rows)
    assert found.dtype == dtype and found.shape == (3, 1)
    # Half precision is squared in float32, where nothing of it overflows.
    assert found.isnan().flatten().tolist() == [False, dtype != torch.float16, False]
    assert not torch.nn.functional.rms_norm(rows, (64,))[found.isnan().flatten()].any()
    assert overflow(torch.full((1, 4), torch.inf, dtype=dtype)).isnan().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [1e20, -1e38])
def test_a_row_that_overflows_spoils_itself_only(dtype: str, value: float, make_checkpoint: Callable[..., Any]) -> None:
    model = load_model(make_checkpoint("llama").folder, dtype, "cpu", "torch")
    cache = Cache(model.config.layers, model.cache_dtype, model.device)

    def logits() -> torch.Tensor:
        spans = [Span(cache.sequence(), 0, 1), Span(cache.sequence(), 1, 3)]
        return model.forward(Rows(torch.tensor([5, 3, 4]), torch.tensor([0, 0, 1]), spans))

    sound = logits()
    assert sound.isfinite().all()
    model.embedding[5] = value
    spoilt = logits()
    assert spoilt[0].isnan().all()
    assert torch.equal(spoilt[1:], sound[1:])
