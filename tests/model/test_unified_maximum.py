"""Unified maxima on a GPU: a constant per head, counts, and giving up; in Triton's interpreter elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

from hasten.cache import Cache, SequenceCache
from hasten.model import Decoder, Rows, load_model
from hasten.model.cuda import attention, unified
from hasten.model.cuda.backend import CudaBackend
from hasten.model.cuda.softmax import Partial
from hasten.model.cuda.unified import Unified
from hasten.model.decoder import TorchBackend

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning")

CONTEXT = 20


@pytest.fixture
def model(make_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """Calibrated by 4 rows, reviewed at each pass, judged by 8 splits."""
    monkeypatch.setattr(unified, "CALIBRATION_ROWS", 4)
    monkeypatch.setattr(unified, "REVIEW_PASSES", 1)
    monkeypatch.setattr(unified, "WINDOW", 8)
    folder = make_checkpoint("qwen3", num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2).folder
    loaded = load_model(folder, dtype="float32", device=DEVICE.type, backend="torch")
    return replace(loaded, backend=CudaBackend())


def behind(model: Decoder) -> SequenceCache:
    """A sequence of `CONTEXT` tokens, read by PyTorch."""
    sequence = Cache(model.config.layers, model.cache_dtype, model.device).sequence()
    TorchBackend().forward(model, Rows.of(sequence, list(range(3, 3 + CONTEXT)), 0, DEVICE), [0], None)
    sequence.commit(CONTEXT)
    return sequence


def step(model: Decoder, sequence: SequenceCache) -> Unified:
    """Two rows, whose logits are those of PyTorch."""
    rows = Rows.of(sequence, [5, 6], CONTEXT, DEVICE)
    ours = model.forward(rows)
    torch.testing.assert_close(ours, TorchBackend().forward(model, rows, None, None), atol=1e-4, rtol=0)
    assert isinstance(model.backend, CudaBackend) and model.backend.unified is not None
    return model.backend.unified


def scores(model: Decoder, sequence: SequenceCache) -> Tensor:
    """float64 [heads, 2 rows, slots] that attention sees in `step`, -inf where it does not look."""
    seen: list[Tensor] = []
    kernel = attention.attend_cache

    rows = Rows.of(sequence, [5, 6], CONTEXT, DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hasten.model.cuda.backend.attend_cache", lambda q, *rest: seen.append(q) or kernel(q, *rest))
        CudaBackend(unified=False).forward(model, rows, None, None)
    (block, _), *_ = sequence.memory(0)
    keys = block.keys[0, :, : CONTEXT + 2]
    found = torch.einsum("rhd,hsd->hrs", seen[0][:2].double(), keys.repeat_interleave(2, 0).double())
    found *= keys.shape[-1] ** -0.5
    found[:, 0, CONTEXT + 1] = -inf
    return found


def test_each_head_gets_the_middle_of_its_own_range(model: Decoder) -> None:
    sequence = behind(model)
    expected = scores(model, sequence).logsumexp(-1)
    state = step(model, sequence)
    assert state.phi.isinf().all() and state.statistics() == {"heads": 4, "unified": 0, "splits": 0, "again": 0}
    low, high = state.ranges[0].double().unbind(-1)
    torch.testing.assert_close(low, expected.amin(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(high, expected.amax(-1), atol=1e-4, rtol=0)
    step(model, sequence)
    torch.testing.assert_close(state.phi[0].double(), (low + high) / 2, atol=1e-5, rtol=0)
    assert len(state.phi.unique()) == 4
    # Four heads of two rows with one split each, and no sum beyond what float32 holds.
    step(model, sequence)
    assert state.statistics() == {"heads": 4, "unified": 4, "splits": 8, "again": 0}


def test_what_a_constant_does_not_fit_is_computed_again_and_counted_and_then_given_up(model: Decoder) -> None:
    sequence = behind(model)
    for _ in range(2):
        state = step(model, sequence)
    # One head of the second key head.
    with torch.inference_mode():
        state.phi[0, 2] += 200.0
    for passes in range(1, 5):
        step(model, sequence)
        assert state.statistics() == {"heads": 4, "unified": 2 if passes == 4 else 4, "splits": 8 * passes,
                                      "again": 2 * passes}  # fmt: skip
    assert state.phi[0].isinf().tolist() == [False, False, True, True]
    step(model, sequence)
    assert state.statistics() == {"heads": 4, "unified": 2, "splits": 36, "again": 8}


def test_few_that_are_computed_again_are_no_reason(model: Decoder) -> None:
    state = Unified(1, 4, 2, DEVICE)
    state.phi.zero_()
    state.counts[0, :, 0] = 1000
    state.counts[0, :, 1] = torch.tensor([0, 10, 11, 0])
    state.passed(1)
    assert state.phi.isinf().tolist() == [[False, False, True, True]]
    assert not state.counts.any() and state.statistics()["splits"] == 4000


def test_heads_whose_range_is_too_wide_or_unknown_get_none() -> None:
    state = Unified(1, 6, 3, DEVICE)
    state.ranges[0, :4] = torch.tensor([[-10.0, 20.0], [0.0, 1.0], [-60.0, 60.0], [0.0, 1.0]], device=DEVICE)
    state.passed(unified.CALIBRATION_ROWS)
    assert state.phi.tolist() == [[5.0, 0.5, inf, inf, inf, inf]]


def test_running_maxima_where_a_constant_may_not_be(model: Decoder, make_checkpoint: Callable[..., Any]) -> None:
    sequence = behind(model)
    rows = Rows.of(sequence, [5, 6], CONTEXT, DEVICE)
    for backend in (CudaBackend(invariant=True), CudaBackend(unified=False)):
        backend.forward(model, rows, None, None)
        assert backend.unified is None


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("strays", [False, True])
def test_splits_of_one_base_are_added_up_and_others_rescaled(splits: int, strays: bool) -> None:
    generator = torch.Generator().manual_seed(splits)
    sums, totals = torch.randn(splits, 3, 4, generator=generator), torch.rand(splits, 3, generator=generator) + 0.1
    bases = torch.full((splits, 3), 7.5)
    if strays:
        # Far above what the first unit's others hold; the second one's is nothing beside them.
        bases[-1, 0], bases[-1, 1] = 90.0, -150.0
    lengths = torch.full((1,), 8 * splits, dtype=torch.int32)
    partial = Partial(sums.to(DEVICE), totals.to(DEVICE), bases.to(DEVICE))
    out, lse = partial.merge(lengths.to(DEVICE), 8, torch.float32, True)
    weights = (bases - bases.amax(0)).double().exp()
    total = (weights * totals).sum(0)
    expected = (weights[..., None] * sums).sum(0) / total[:, None]
    torch.testing.assert_close(out.cpu().double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.cpu().double(), bases.amax(0) + total.log(), atol=1e-5, rtol=0)


def test_splits_of_one_base_do_not_look_at_it() -> None:
    """Of infinite ones, rescaling would make NaN."""
    sums, totals, bases = torch.ones(3, 1, 4), torch.tensor([[1.0], [2.0], [5.0]]), torch.full((3, 1), inf)
    lengths = torch.full((1,), 24, dtype=torch.int32)
    partial = Partial(sums.to(DEVICE), totals.to(DEVICE), bases.to(DEVICE))
    out, _ = partial.merge(lengths.to(DEVICE), 8, torch.float32, True)
    assert out.tolist() == [[0.375] * 4]
    out, _ = partial.merge(lengths.to(DEVICE), 8, torch.float32, False)
    assert out.isnan().all()
