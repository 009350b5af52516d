"""Kernels agree with the softmax written out, and any split of the keys into parts merges to the whole."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from hasten.model.attention import (
    PER_HEAD_CAUSAL_ROWS,
    Kernel,
    Part,
    additive,
    attend,
    causal_mask,
    cpu_flash_kernel,
    kernel_for,
    merge,
    reference_kernel,
)

Mask = Tensor | Literal["causal"] | None
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}
KERNELS = pytest.mark.parametrize("kernel", [reference_kernel, cpu_flash_kernel])


def closed_form(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Attention in float64, row by row, over the slots that `seen` [rows, slots] allows."""
    queries, keys, values = queries.double(), keys.double(), values.double()
    out = torch.zeros(*queries.shape[:2], values.shape[-1], dtype=torch.float64)
    lse = torch.full(queries.shape[:2], -torch.inf, dtype=torch.float64)
    for head in range(queries.shape[0]):
        for row in range(queries.shape[1]):
            slots = seen[row].nonzero().flatten()
            if len(slots):
                scores = keys[head, slots] @ queries[head, row] / queries.shape[-1] ** 0.5
                out[head, row] = scores.softmax(0) @ values[head, slots]
                lse[head, row] = scores.logsumexp(0)
    return out, lse


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_seen(seed: int, rows: int, slots: int) -> Tensor:
    """Booleans in which every row sees something."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.rand(rows, slots, generator=generator) < 0.5
    seen[torch.arange(rows), torch.randint(slots, (rows,), generator=generator)] = True
    return seen


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Mask, Tensor]:
    """(queries, keys, values, mask, seen)."""
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    heads, rows, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 70)), draw(st.integers(1, 40))
    kind = draw(st.sampled_from(["none", "causal", "additive"]))
    slots = rows if kind == "causal" else draw(st.integers(1, 90))
    seed = draw(st.integers(0, 2**32))
    queries = noise(seed, heads, rows, head_dim, dtype=dtype)
    keys, values = noise(seed + 1, 2, heads, slots, head_dim, dtype=dtype)
    if kind == "none":
        return queries, keys, values, None, torch.ones(rows, slots, dtype=torch.bool)
    if kind == "causal":
        return queries, keys, values, "causal", torch.ones(rows, rows, dtype=torch.bool).tril()
    seen = random_seen(seed + 2, rows, slots)
    return queries, keys, values, additive(seen, dtype), seen


@KERNELS
@given(problems())
def test_kernels_are_the_closed_form(kernel: Kernel, problem: tuple[Tensor, Tensor, Tensor, Mask, Tensor]) -> None:
    queries, keys, values, mask, seen = problem
    out, lse = kernel(queries, keys, values, mask)
    expected, expected_lse = closed_form(queries, keys, values, seen)
    tolerance = TOLERANCE[queries.dtype]
    assert out.dtype == queries.dtype
    assert lse.dtype == torch.promote_types(queries.dtype, torch.float32)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 5, 200])
def test_flash_is_the_reference_where_its_first_blocks_of_keys_are_masked(rows: int, dtype: torch.dtype) -> None:
    """The kernel walks the keys in blocks of 512: a block in which a row sees nothing must not leave NaN."""
    slots = 1300
    queries, (keys, values) = noise(0, 2, rows, 8, dtype=dtype), noise(1, 2, 2, slots, 8, dtype=dtype)
    seen = torch.ones(rows, slots, dtype=torch.bool)
    seen[: (rows + 1) // 2, :1100] = False
    seen[rows // 2 :, 40:1250] = False
    mask = additive(seen, dtype)
    out, lse = cpu_flash_kernel(queries, keys, values, mask)
    expected, expected_lse = reference_kernel(queries, keys, values, mask)
    torch.testing.assert_close(out, expected, atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("scale", [1e-3, 30.0])
@KERNELS
def test_kernels_survive_large_and_small_scores(kernel: Kernel, scale: float) -> None:
    queries, (keys, values) = scale * noise(0, 2, 9, 16), noise(1, 2, 2, 33, 16)
    out, lse = kernel(queries, keys, values, None)
    expected, expected_lse = closed_form(queries, keys, values, torch.ones(9, 33, dtype=torch.bool))
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-4)


@KERNELS
def test_no_rows_or_no_slots_are_no_crash(kernel: Kernel) -> None:
    queries, keys = noise(0, 2, 3, 8), noise(1, 2, 5, 8)
    out, lse = kernel(queries[:, :0], keys, keys, None)
    assert out.shape == (2, 0, 8)
    assert lse.shape == (2, 0)
    out, lse = kernel(queries, keys[:, :0], keys[:, :0], None)
    assert torch.equal(out, torch.zeros_like(queries))
    assert torch.equal(lse, torch.full((2, 3), -torch.inf))


@KERNELS
def test_kernels_read_views(kernel: Kernel) -> None:
    """Keys and values are slices of a block, and queries slices of a packed batch."""
    queries = noise(0, 30, 3, 16).transpose(0, 1)[:, 5:17]
    keys, values = noise(1, 2, 3, 64, 16)[:, :, 10:41]
    out, lse = kernel(queries, keys, values, None)
    expected, expected_lse = kernel(queries.contiguous(), keys.contiguous(), values.contiguous(), None)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-6, rtol=0)


def test_every_device_has_a_kernel() -> None:
    assert kernel_for(torch.device("cpu")) is cpu_flash_kernel
    assert kernel_for(torch.device("cuda")) is reference_kernel


# Parts


@KERNELS
@given(
    cuts=st.lists(st.integers(1, 60), max_size=4, unique=True),
    rows=st.integers(1, 9),
    group=st.integers(1, 3),
    masked=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example(cuts=[1], rows=3, group=2, masked=True, seed=0)
def test_any_split_of_the_keys_merges_to_the_whole(
    kernel: Kernel, cuts: list[int], rows: int, group: int, masked: bool, seed: int
) -> None:
    slots = 61
    queries = noise(seed, rows, 2 * group, 8)
    keys, values = noise(seed + 1, 2, 2, slots, 8)
    seen = random_seen(seed + 2, rows, slots) if masked else torch.ones(rows, slots, dtype=torch.bool)
    bounds = [0, *sorted(cuts), slots]
    # The part whose slots every row sees comes first, as the merge asks: a last slot that all see.
    seen[:, -1] = True
    parts: list[Part] = []
    for start, stop in itertools.pairwise(bounds):
        piece = seen[:, start:stop]
        parts.insert(
            0,
            Part(
                keys[:, start:stop],
                values[:, start:stop],
                additive(piece, queries.dtype) if masked else None,
                ~piece.any(1) if masked else None,
            ),
        )
    out, lse = attend(queries, parts, kernel)
    expected, expected_lse = closed_form(
        queries.transpose(0, 1),
        keys.repeat_interleave(group, 0),
        values.repeat_interleave(group, 0),
        seen,
    )
    for got, wanted in ((out, expected), (lse, expected_lse)):
        torch.testing.assert_close(got.double(), wanted.transpose(0, 1), atol=TOLERANCE[torch.float32], rtol=0)


def test_values_may_have_a_width_of_their_own() -> None:
    queries, keys, values = noise(0, 5, 4, 8), noise(1, 2, 9, 8), noise(2, 2, 9, 6)
    out, lse = attend(
        queries, [Part(keys[:, :4], values[:, :4]), Part(keys[:, 4:], values[:, 4:], "causal")], cpu_flash_kernel
    )
    seen = torch.ones(5, 9, dtype=torch.bool).tril(4)
    grouped = keys.repeat_interleave(2, 0), values.repeat_interleave(2, 0)
    expected, expected_lse = closed_form(queries.transpose(0, 1), *grouped, seen)
    assert out.shape == (5, 4, 6)
    for got, wanted in ((out, expected), (lse, expected_lse)):
        torch.testing.assert_close(got.double(), wanted.transpose(0, 1), atol=TOLERANCE[torch.float32], rtol=0)


def test_merge_gives_a_blind_part_no_weight() -> None:
    out, lse, nothing = noise(0, 2, 3, 4), noise(1, 2, 3), torch.full((2, 3), -torch.inf)
    zeros = torch.zeros_like(out)
    for merged, merged_lse in (merge(out, lse, zeros, nothing), merge(zeros, nothing, out, lse)):
        assert torch.equal(merged, out)
        assert torch.equal(merged_lse, lse)


def test_merge_survives_a_wide_gap() -> None:
    out, other = noise(0, 2, 3, 4), noise(1, 2, 3, 4)
    low, high = torch.full((2, 3), -300.0), torch.full((2, 3), 300.0)
    assert torch.equal(merge(out, low, other, high)[0], other)
    assert torch.equal(merge(out, high, other, low)[0], out)


@KERNELS
def test_blind_rows_see_the_other_parts_only(kernel: Kernel) -> None:
    queries, (keys, values) = noise(0, 4, 6, 8), noise(1, 2, 2, 10, 8)
    blind = torch.tensor([True, False, True, False])
    seen = torch.zeros(4, 7, dtype=torch.bool)
    seen[1, 3] = seen[3, :] = True
    own = Part(keys[:, 7:], values[:, 7:])
    out, _ = attend(queries, [own, Part(keys[:, :7], values[:, :7], additive(seen, queries.dtype), blind)], kernel)
    alone, _ = attend(queries, [own], kernel)
    assert torch.equal(out[blind], alone[blind])
    assert (out[~blind] - alone[~blind]).abs().max() > 1e-3
    assert torch.isfinite(out).all()


@KERNELS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "heads", "kv_heads"), [(1, 4, 2), (7, 6, 2), (7, 5, 1), (7, 3, 3)])
def test_query_groups_share_keys_as_if_these_were_repeated(
    kernel: Kernel, masked: bool, rows: int, heads: int, kv_heads: int
) -> None:
    group, slots = heads // kv_heads, 11
    queries, (keys, values) = noise(0, rows, heads, 8), noise(1, 2, kv_heads, slots, 8)
    mask = additive(random_seen(2, rows, slots), queries.dtype) if masked else None
    folded = attend(queries, [Part(keys, values, mask)], kernel)
    repeated = Part(keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0), mask)
    torch.testing.assert_close(folded, attend(queries, [repeated], kernel), atol=1e-6, rtol=0)


@KERNELS
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, PER_HEAD_CAUSAL_ROWS - 1, PER_HEAD_CAUSAL_ROWS, 150])
def test_causal_parts_for_few_and_many_rows(kernel: Kernel, rows: int, group: int) -> None:
    queries, (keys, values) = noise(0, rows, 2 * group, 8), noise(1, 2, 2, rows, 8)
    out, lse = attend(queries, [Part(keys, values, "causal")], kernel)
    mask = causal_mask(rows, queries.dtype, queries.device)
    expected = attend(queries, [Part(keys, values, mask)], reference_kernel)
    torch.testing.assert_close((out, lse), expected, atol=1e-5, rtol=0)


def test_many_causal_rows_of_a_group_go_one_call_per_member() -> None:
    calls: list[tuple[object, int]] = []

    def spy(queries: Tensor, keys: Tensor, values: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        calls.append((mask.shape if isinstance(mask, Tensor) else mask, queries.shape[1]))
        return reference_kernel(queries, keys, values, mask)

    for rows in (PER_HEAD_CAUSAL_ROWS, 10):
        keys = noise(1, 2, rows, 8)
        attend(noise(0, rows, 6, 8), [Part(keys, keys, "causal")], spy)
    assert calls == [("causal", PER_HEAD_CAUSAL_ROWS)] * 3 + [(torch.Size([30, 10]), 30)]


def test_masks() -> None:
    inf = torch.inf
    assert causal_mask(3, torch.float32, torch.device("cpu")).tolist() == [
        [0, -inf, -inf],
        [0, 0, -inf],
        [0, 0, 0],
    ]
    assert additive(torch.tensor([[True, False]]), torch.bfloat16).tolist() == [[0, -inf]]
