"""The CUDA backend and its kernels against PyTorch: on a GPU where there is one, in Triton's interpreter elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_device import DEVICE, GPU

from hasten import LLM, SamplingParams, UserError
from hasten.cache import Cache, SequenceCache
from hasten.model import Decoder, LayerConfig, Rows, Span, Taps, load_model
from hasten.model.attention import additive, attend, reference_kernel
from hasten.model.cuda import backend, part, refusal
from hasten.model.cuda.attention import MAX_PENDING
from hasten.model.cuda.backend import SHORT, CudaBackend
from hasten.model.cuda.packing import MAX_VIEWS
from hasten.model.cuda.part import MANY_ROWS, triton_kernel
from hasten.model.cuda.softmax import SPLIT
from hasten.model.decoder import TorchBackend
from hasten.model.layers import Layer, RMSNorm
from hasten.model.linear import DenseLinear
from hasten.model.rows import SequenceState
from helpers import Bushy

NEEDS_GPU = pytest.mark.skipif(not GPU, reason="needs a GPU")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FIXED = backend.FIXED if GPU else 8
"""Rows of a piece with `invariant`; the interpreter takes its time for each."""
# NumPy, which the interpreter computes with, has no bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning")


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def random_seen(seed: int, rows: int, slots: int) -> Tensor:
    return (torch.rand(rows, slots, generator=torch.Generator().manual_seed(seed)) < 0.5).to(DEVICE)


# The kernel of a part


@settings(max_examples=25)
@given(
    dtype=st.sampled_from(DTYPES),
    heads=st.integers(1, 2),
    rows=st.integers(1, MANY_ROWS + 6),
    slots=st.integers(1, 90),
    head_dim=st.integers(1, 40),
    kind=st.sampled_from(["none", "causal", "additive"]),
    seed=st.integers(0, 2**32),
)
def test_the_kernel_is_the_reference(
    dtype: torch.dtype, heads: int, rows: int, slots: int, head_dim: int, kind: str, seed: int
) -> None:
    slots = rows if kind == "causal" else slots
    queries, keys = (
        noise(seed, heads, rows, head_dim, dtype=dtype),
        noise(seed + 1, heads, slots, head_dim, dtype=dtype),
    )
    values = noise(seed + 2, heads, slots, head_dim, dtype=dtype)
    # Some rows see nothing.
    mask: Any = {"none": None, "causal": "causal"}.get(kind, additive(random_seen(seed, rows, slots), dtype))
    same_as_reference(queries, keys, values, mask)


def same_as_reference(queries: Tensor, keys: Tensor, values: Tensor, mask: Any, phi: float | None = None) -> None:
    out, lse = triton_kernel(queries, keys, values, mask, phi)
    expected, expected_lse = reference_kernel(queries, keys, values, mask)
    assert (out.dtype, lse.dtype) == (expected.dtype, expected_lse.dtype)
    tolerance = TOLERANCE[queries.dtype]
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse, atol=tolerance, rtol=1e-6)


@pytest.mark.parametrize("slots", [SPLIT - 1, SPLIT, SPLIT + 1, 3 * SPLIT + 7])
@pytest.mark.parametrize("rows", [1, 20, MANY_ROWS + 1])
def test_split_keys(rows: int, slots: int) -> None:
    queries, keys, values = noise(0, 2, rows, 16), noise(1, 2, slots, 16), noise(2, 2, slots, 16)
    same_as_reference(queries, keys, values, None)
    # Rows whose first or last splits are masked as a whole.
    seen = torch.ones(rows, slots, dtype=torch.bool, device=DEVICE)
    seen[: rows // 2, : SPLIT - 1] = False
    seen[rows // 2 :, 9:] = False
    same_as_reference(queries, keys, values, additive(seen, torch.float32))


def test_the_kernel_reads_views_and_knows_empty_parts() -> None:
    queries, block = noise(0, 30, 3, 16).transpose(0, 1)[:, 5:17], noise(1, 2, 3, 64, 16)
    keys, values = block[:, :, 10:41]
    same_as_reference(queries, keys, values, None)
    same_as_reference(queries[:, :0], keys, values, None)
    same_as_reference(queries, keys[:, :0], values[:, :0], None)


def test_the_kernel_serves_parts() -> None:
    from hasten.model.attention import Part

    queries, keys, values = noise(0, 7, 6, 16), noise(1, 2, 50, 16), noise(2, 2, 50, 16)
    own = Part(keys[:, 43:], values[:, 43:], "causal")
    parts = [Part(keys[:, :43], values[:, :43]), own]
    expected = attend(queries, parts, reference_kernel)
    torch.testing.assert_close(attend(queries, parts, triton_kernel), expected, atol=1e-5, rtol=0)


# The unified maximum

SCORES = {
    "near phi": (1.0, 0.0),
    "far above": (1.0, 300.0),
    "far below": (1.0, -300.0),
    "wide": (60.0, 0.0),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("slots", [1, 40, 2 * SPLIT + 3])
def test_a_unified_maximum_is_exact_wherever_scores_lie(name: str, slots: int) -> None:
    spread, centre = SCORES[name]
    queries, keys, values = noise(0, 1, 9, 16), noise(1, 1, slots, 16), noise(2, 1, slots, 16)
    # One channel shifts all scores of every other row; the rest of the rows stay near phi.
    queries, keys = queries * spread, keys.clone()
    queries[..., 0], keys[..., 0] = 0.0, 4.0
    queries[:, ::2, 0] = centre
    # A sink: one slot with a far larger score than all others.
    keys[:, 0, 1] += 20.0
    same_as_reference(queries, keys, values, None, phi=0.5)
    seen = random_seen(3, 9, slots)
    same_as_reference(queries, keys, values, additive(seen, torch.float32), phi=0.5)


@pytest.mark.skipif(GPU, reason="looks into Triton's interpreter")
@pytest.mark.parametrize(
    ("shift", "phi", "again"), [(0.0, 0.5, 0), (59.0, 59.0, 0), (0.0, 59.0, 0), (0.0, 200.0, 1), (0.0, -200.0, 1)]
)
def test_the_unified_maximum_is_what_weights_are_taken_from(
    shift: float, phi: float, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is the same with any: so the sums themselves are looked at, and what is computed a second time."""
    advance, sums, passes = part.advance, [], []

    def watched(acc: Any, total: Any, most: Any, *rest: Any) -> Any:
        result = advance(acc, total, most, *rest)
        passes.append(bool(rest[-1]))
        sums.append(result[1].handle.data.copy())
        return result

    monkeypatch.setattr(part, "advance", watched)
    queries, keys, values = noise(0, 1, 3, 16), noise(1, 1, 20, 16), noise(2, 1, 20, 16)
    queries[..., 0], keys[..., 0] = 4.0, shift
    same_as_reference(queries, keys, values, None, phi)
    walks = len(passes) // (1 + again)
    assert passes == [True] * walks + [False] * walks * again
    scores = (queries[0] @ keys[0].T).double() * 16**-0.5
    unified = (scores - phi).exp().sum(1)
    torch.testing.assert_close(torch.tensor(sums[walks - 1][:3]), unified.float(), rtol=1e-3, atol=1e-37)


def test_rows_near_the_unified_maximum_are_not_touched_by_those_beyond_it() -> None:
    queries, keys, values = noise(0, 1, 5, 16), noise(1, 1, 70, 16), noise(2, 1, 70, 16)
    alone, _ = triton_kernel(queries, keys, values, None, 0.5)
    queries[:, 3] *= 1000
    beside, _ = triton_kernel(queries, keys, values, None, 0.5)
    kept = [0, 1, 2, 4]
    assert torch.equal(beside[:, kept], alone[:, kept])


def test_a_unified_maximum_refuses_float16() -> None:
    part = noise(0, 1, 2, 16, dtype=torch.float16)
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        triton_kernel(part, part, part, None, 0.0)


# The backend

ODD = {"num_attention_heads": 6, "head_dim": 20, "intermediate_size": 77, "attention_bias": True}
# What layers pass on to each other, one case shows.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": 2}),
    "llama-odd": ("llama", {"num_hidden_layers": 1, **ODD}),
    "llama-mqa-tied": ("llama", {"num_hidden_layers": 1, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-mha": ("llama", {"num_hidden_layers": 1, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", {"num_hidden_layers": 1}),
    "qwen3": ("qwen3", {"num_hidden_layers": 1}),
}


def load(make_checkpoint: Callable[..., Any], name: str, dtype: str = "float32", **options: Any) -> Decoder:
    architecture, settings = CASES[name]
    model = load_model(
        make_checkpoint(architecture, **settings).folder, dtype=dtype, device=DEVICE.type, backend="torch"
    )
    return replace(model, backend=CudaBackend(**options))


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Any]) -> Decoder:
    return load(make_checkpoint, request.param)


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Any]) -> Decoder:
    return load(make_checkpoint, "llama")


@pytest.fixture
def invariant(make_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Decoder:
    monkeypatch.setattr(backend, "FIXED", FIXED)
    return load(make_checkpoint, "llama", invariant=True)


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def cache_of(model: Decoder) -> Cache:
    return Cache(model.config.layers, model.cache_dtype, model.device)


def behind(model: Decoder, cache: Cache, count: int, seed: int = 0) -> SequenceCache:
    """A sequence that holds so many tokens, read by PyTorch."""
    sequence = cache.sequence()
    if count:
        TorchBackend().forward(model, Rows.of(sequence, some_tokens(count, seed), 0, DEVICE), [0], None)
        sequence.commit(count)
    return sequence


def tree(parents: list[int]) -> tuple[Tensor, list[int]]:
    """(mask, depths) of a tree whose first row is the root."""
    mask, depths = torch.eye(len(parents), dtype=torch.bool), [0] * len(parents)
    for node, parent in enumerate(parents):
        if node:
            mask[node] |= mask[parent]
            depths[node] = depths[parent] + 1
    return mask.to(DEVICE), depths


def rows_of(*pieces: tuple[SequenceState, list[int], list[int], Tensor | None]) -> Rows:
    """A packed batch of (sequence, tokens, positions, mask)."""
    tokens: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    for sequence, ids, places, mask in pieces:
        spans.append(Span(sequence, len(tokens), len(tokens) + len(ids), mask))
        tokens += ids
        positions += places
    return Rows(torch.tensor(tokens, device=DEVICE), torch.tensor(positions, device=DEVICE), spans)


def agree(model: Decoder, rows: Rows, wanted: list[int] | None = None, tolerance: float = 1e-4) -> Tensor:
    """The backend's logits, after a comparison with PyTorch's for the same pass."""
    ours = model.forward(rows, wanted)
    for span in rows.spans:
        if span.extend:
            # Of this pass only: its rows replace those that the first pass left.
            for each in (span.sequence, *span.sequence.groups):
                each.pending -= span.stop - span.start
    theirs = TorchBackend().forward(model, rows, wanted, None)
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
    return ours


def batch(model: Decoder) -> Rows:
    """Unequal rows: single ones, chains, a tree, a prompt that begins."""
    cache = cache_of(model)
    mask, depths = tree([0, 0, 0, 1, 1, 4])
    return rows_of(
        (behind(model, cache, 11), some_tokens(1), [11], None),
        (behind(model, cache, 70, 1), some_tokens(6, 1), [70 + depth for depth in depths], mask),
        (cache.sequence(), some_tokens(4, 2), list(range(4)), None),
        (behind(model, cache, SPLIT + 30, 3), some_tokens(3, 3), list(range(SPLIT + 30, SPLIT + 33)), None),
    )


def test_logits_are_those_of_pytorch(case: Decoder) -> None:
    agree(case, batch(case))


def test_some_rows_in_another_order(model: Decoder) -> None:
    agree(model, batch(model), [12, 3, 0, -1])


@pytest.mark.parametrize("count", [1, 2, 3, 17, SHORT])
def test_every_bucket_and_its_padding(model: Decoder, count: int) -> None:
    sequence = behind(model, cache_of(model), 23)
    sequence.reserve(count)
    (block, _), *_ = sequence.memory(0)
    for slots in (block.keys, block.values):
        slots[:, :, 23:] = 7.0
    before = torch.stack([block.keys, block.values])
    agree(model, rows_of((sequence, some_tokens(count), list(range(23, 23 + count)), None)))
    # Padding has written nothing: not before the rows, and not behind them.
    storage = torch.stack([block.keys, block.values])
    assert torch.equal(storage[:, :, :, :23], before[:, :, :, :23])
    assert torch.equal(storage[:, :, :, 23 + count :], before[:, :, :, 23 + count :])


def test_decoding_row_by_row_fills_the_cache(model: Decoder) -> None:
    text = some_tokens(12, 4)
    sequence = cache_of(model).sequence()
    logits = []
    for place, token in enumerate(text):
        logits.append(model.forward(rows_of((sequence, [token], [place], None))))
        sequence.commit(1)
    whole = TorchBackend().forward(model, Rows.of(cache_of(model).sequence(), text, 0, DEVICE), None, None)
    torch.testing.assert_close(torch.cat(logits), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("past", [0, 62, 64, SPLIT - 2])
def test_trees_wherever_they_begin(model: Decoder, past: int) -> None:
    """Around the edges of chunks and splits, where rows part ways."""
    generator = torch.Generator().manual_seed(past)
    parents = [0] + [int(torch.randint(node, (1,), generator=generator)) for node in range(1, 12)]
    mask, depths = tree(parents)
    sequence = behind(model, cache_of(model), past)
    agree(model, rows_of((sequence, some_tokens(12), [past + depth for depth in depths], mask)))


def test_rows_that_see_later_ones(model: Decoder) -> None:
    """A block that looks both ways."""
    mask = torch.ones(7, 7, dtype=torch.bool, device=DEVICE)
    sequence = behind(model, cache_of(model), 40)
    agree(model, rows_of((sequence, some_tokens(7), list(range(40, 47)), mask)))


@pytest.mark.parametrize("masked", [False, True])
def test_spans_that_extend_what_is_pending(model: Decoder, masked: bool) -> None:
    sequence = behind(model, cache_of(model), 33)
    first, depths = tree([0, 0, 0])
    model.forward(rows_of((sequence, some_tokens(3), [33 + depth for depth in depths], first if masked else None)))
    rows = rows_of((sequence, some_tokens(4, 1), [35, 35, 35, 36], None))
    mask, _ = tree([0, 0, 0, 1, 2, 2, 3])
    rows.spans[0].extend, rows.spans[0].mask = True, mask[3:] if masked else None
    agree(model, rows)
    assert sequence.pending == 7


def test_forked_sequences_read_several_blocks(model: Decoder) -> None:
    cache = cache_of(model)
    parent = behind(model, cache, 40)
    forks = []
    for seed in range(3):
        child = parent.fork()
        pieces = rows_of((child, some_tokens(5, seed), list(range(40, 45)), None))
        TorchBackend().forward(model, pieces, [0], None)
        child.commit(5)
        forks.append(child)
        parent = child
    assert len(forks[-1].memory(0)) > 1
    mask, depths = tree([0, 0, 1])
    end = forks[-1].length
    chain = (forks[-1], some_tokens(3), [end + depth for depth in depths], mask)
    agree(model, rows_of((forks[0], [7], [45], None), chain))


def test_rows_may_enter_as_embeddings(model: Decoder) -> None:
    text = some_tokens(6)
    rows = Rows.of(cache_of(model).sequence(), text, 0, DEVICE)
    expected = model.forward(rows)
    embedded = torch.tensor([False, True, True, False, True, False], device=DEVICE)
    rows.embeddings = torch.where(embedded.unsqueeze(-1), model.embed(rows), torch.nan)
    rows.tokens = rows.tokens.masked_fill(embedded, -1)
    assert torch.equal(model.forward(rows), expected)


def test_a_row_that_overflows_is_nan_and_spoils_no_other(model: Decoder) -> None:
    cache = cache_of(model)
    sound = model.forward(rows_of((cache.sequence(), some_tokens(3), [0, 1, 2], None)))
    rows = rows_of((cache.sequence(), [5], [0], None), (cache.sequence(), some_tokens(3), [0, 1, 2], None))
    rows.embeddings = torch.full((4, model.config.hidden_size), 1e20, device=DEVICE)
    rows.tokens[0] = -1
    logits = model.forward(rows)
    assert logits[0].isnan().all()
    torch.testing.assert_close(logits[1:], sound, atol=1e-4, rtol=0)


def test_taps_are_pytorchs(model: Decoder) -> None:
    sites: Any = ["input", "attention_input", "attention_output", "mlp_input", "output"]
    wanted: Any = [(site, layer) for site in sites for layer in range(2)] + [("final_norm", 0)]
    rows, ours, theirs = batch(model), Taps(wanted), Taps(wanted)
    logits = model.forward(rows, [2, 0], ours)
    torch.testing.assert_close(logits, TorchBackend().forward(model, rows, [2, 0], theirs), atol=1e-4, rtol=0)
    assert ours.states.keys() == theirs.states.keys()
    for key, state in theirs.states.items():
        torch.testing.assert_close(ours[key], state, atol=1e-4, rtol=0)


def test_what_the_graphs_do_not_know_goes_to_pytorch(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the step ran")

    monkeypatch.setattr(CudaBackend, "_step", refuse)
    cache = cache_of(model)
    agree(model, rows_of((cache.sequence(), some_tokens(SHORT + 1), list(range(SHORT + 1)), None)))
    shape = (2, MAX_PENDING + 1)
    sequence = cache.sequence()
    TorchBackend().forward(model, Rows.of(sequence, some_tokens(MAX_PENDING - 1), 0, DEVICE), [0], None)
    rows = rows_of((sequence, [3, 4], [500, 501], torch.ones(shape, dtype=torch.bool, device=DEVICE)))
    rows.spans[0].extend = True
    agree(model, rows)
    chain = behind(model, cache, 2)
    for _ in range(MAX_VIEWS):
        older, chain = chain, chain.fork()
        for writer in (older, chain):
            TorchBackend().forward(model, Rows.of(writer, [5], writer.length, DEVICE), [0], None)
            writer.commit(1)
    assert len(chain.memory(0)) >= MAX_VIEWS
    agree(model, rows_of((chain, [3], [chain.length], None)))


@pytest.mark.parametrize("strange", ["linear", "norm", "layer", "shape"])
def test_pieces_that_the_graphs_do_not_know_go_to_pytorch(
    strange: str, make_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph replays kernels only, and they know one shape; where bits are promised, that is refused."""
    plain = load(make_checkpoint, "llama")

    def refuse(*_: Any) -> None:
        raise AssertionError("the step ran")

    monkeypatch.setattr(CudaBackend, "_step", refuse)
    layer, shape = copy(plain.layers[1]), plain.config.layers[1]
    if strange == "linear":
        layer.mlp = copy(layer.mlp)
        layer.mlp.down = type("Strange", (DenseLinear,), {})(layer.mlp.down.dequant())
    elif strange == "norm":
        layer.mlp_norm = type("Strange", (RMSNorm,), {})(layer.mlp_norm.weight, layer.mlp_norm.eps)
    elif strange == "layer":
        layer.__class__ = type("Strange", (Layer,), {})
    else:
        shape = replace(shape, keeps=replace(shape.slots, heads=1))
        layer.mixer = copy(layer.mixer)
        layer.mixer.config, qkv = shape, layer.mixer.qkv.dequant()
        layer.mixer.qkv = DenseLinear(torch.cat([qkv[:60], qkv[72:84]]))
    model = replace(
        plain, layers=[plain.layers[0], layer], config=replace(plain.config, layers=(plain.config.layers[0], shape))
    )
    rows = rows_of((cache_of(model).sequence(), [3, 4], [0, 1], None))
    agree(model, rows)
    model.backend = CudaBackend(invariant=True)
    with pytest.raises(UserError, match="the graphs do not know"):
        model.forward(rows)


def test_rows_that_are_not_there_are_refused(model: Decoder) -> None:
    with pytest.raises(IndexError):
        model.forward(Rows.of(cache_of(model).sequence(), [3, 4], 0, DEVICE), [2])


# Rows that do not depend on each other


def test_a_row_is_the_same_bits_beside_any_others(invariant: Decoder) -> None:
    cache = cache_of(invariant)
    text, past = some_tokens(2 * FIXED + 3, 1), 61
    sequence = behind(invariant, cache, past)
    whole = agree(invariant, rows_of((sequence, text, list(range(past, past + len(text))), None)))
    for count in (1, 2, 5, FIXED, FIXED + 3):
        some = rows_of((sequence, text[:count], list(range(past, past + count)), None))
        assert torch.equal(invariant.forward(some), whole[:count])
    other = behind(invariant, cache, 90, 5)
    beside = rows_of((other, [1, 2, 3], [90, 91, 92], None), (sequence, text[:4], list(range(past, past + 4)), None))
    assert torch.equal(invariant.forward(beside)[3:], whole[:4])
    # One by one, as plain decoding does.
    for row in range(6):
        assert torch.equal(invariant.forward(rows_of((sequence, [text[row]], [past + row], None)))[0], whole[row])
        sequence.commit(1)


def test_a_tree_gives_each_path_its_chain_to_the_bit(invariant: Decoder) -> None:
    for past in (5, 62, SPLIT - 2):
        sequence = behind(invariant, cache_of(invariant), past)
        mask, depths = tree([0, 0, 0, 2, 3, 3])
        ids = some_tokens(6)
        logits = invariant.forward(rows_of((sequence, ids, [past + depth for depth in depths], mask)))
        for path in ([0, 1], [0, 2, 3, 5]):
            chain = rows_of((sequence, [ids[node] for node in path], list(range(past, past + len(path))), None))
            assert torch.equal(invariant.forward(chain), logits[path])


def test_pieces_keep_trees_whole_and_give_taps_of_all_rows(invariant: Decoder) -> None:
    cache = cache_of(invariant)
    mask, depths = tree([0, 0, 1, 1, 2])
    both = torch.ones(5, 5, dtype=torch.bool, device=DEVICE)
    rows = rows_of(
        (cache.sequence(), some_tokens(FIXED - 2), list(range(FIXED - 2)), None),
        (behind(invariant, cache, 12), some_tokens(5, 3), list(range(12, 17)), both),
        (cache.sequence(), some_tokens(FIXED), list(range(FIXED)), None),
        (behind(invariant, cache, 30), some_tokens(5, 3), [30 + depth for depth in depths], mask),
    )
    total = rows.tokens.shape[0]
    agree(invariant, rows)
    agree(invariant, rows, [total - 1, 0, FIXED, 3])
    wanted: Any = [("output", 1)]
    ours, theirs = Taps(wanted), Taps(wanted)
    invariant.forward(rows, [0], ours)
    TorchBackend().forward(invariant, rows, [0], theirs)
    torch.testing.assert_close(ours["output", 1], theirs["output", 1], atol=1e-4, rtol=0)


def test_large_masks_in_pieces(invariant: Decoder) -> None:
    count = FIXED + 5
    mask, depths = tree([0] + [node // 2 for node in range(count - 1)])
    sequence = behind(invariant, cache_of(invariant), 10)
    agree(invariant, rows_of((sequence, some_tokens(count), [10 + depth for depth in depths], mask)))


@pytest.mark.parametrize("count", [FIXED + 1, FIXED + 5])
def test_invariance_is_refused_rather_than_lost(
    invariant: Decoder, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that all see each other cannot be cut; PyTorch serves them where nothing else was promised."""
    sequence = behind(invariant, cache_of(invariant), 10)
    places = list(range(10, 10 + count))
    ahead = torch.ones(count, count, dtype=torch.bool, device=DEVICE)
    rows = rows_of((sequence, some_tokens(count), places, ahead))
    with pytest.raises(UserError, match=f"{count} rows see each other, as those of a canvas do, and {FIXED} at most"):
        invariant.forward(rows)
    few = rows_of((sequence, some_tokens(FIXED), places[:FIXED], ahead[:FIXED, :FIXED]))
    agree(invariant, few)
    monkeypatch.setattr(backend, "fits", lambda rows: False)
    with pytest.raises(UserError, match="invariant numerics on a GPU: a mask may have"):
        invariant.forward(few)
    invariant.backend = CudaBackend()
    agree(invariant, rows)


def test_a_row_that_is_wanted_twice_keeps_its_bits(invariant: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = behind(invariant, cache_of(invariant), 10)
    rows = rows_of((sequence, some_tokens(5), list(range(10, 15)), None))
    once = invariant.forward(rows)
    monkeypatch.setattr(TorchBackend, "forward", lambda *arguments: pytest.fail("another library computes other bits"))
    assert torch.equal(invariant.forward(rows, [3, 0, 3, -1]), once[[3, 0, 3, 4]])


@pytest.mark.parametrize("options", [{}, {"invariant": True}])
def test_methods_give_plain_decodings_tokens(
    tiny: Any, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "FIXED", FIXED)
    llm = LLM(tiny, dtype="float32", device=DEVICE.type, backend="torch")
    llm.model.backend = CudaBackend(**options)
    prompts = [[2, 3, 4] * 3, list(range(10, 15))]
    params = SamplingParams(max_tokens=5, seed=3, ignore_eos=True)
    plain = llm.generate(prompts, params, "plain")
    expected = [each.token_ids for each in plain]
    for method in ("ngram:minimum=1", Bushy(plain, length=2)):
        assert [each.token_ids for each in llm.generate(prompts, params, method)] == expected


# For GPUs that are not here

COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32"}
CODES = {int: "i32", float: "fp32"}

def compile(kernel, *arguments, grid, warmup, **named):
    options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
    signature, constants, aligned = {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        value = arguments[number] if number < len(arguments) else named[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], aligned[(number,)] = "*" + NAMES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = CODES[type(value)]
    for generation in (80, 90):
        source = ASTSource(kernel, signature, constants, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)
        assert made.metadata.shared <= 99 * 1024
        print(kernel.__name__, len(made.asm["cubin"]))

JITFunction.run = compile
from hasten.cache import Cache
from hasten.model import Rows, load_model
from hasten.model.attention import causal_mask
from hasten.model.cuda.part import triton_kernel
from hasten.model.cuda.backend import CudaBackend
from hasten.model.cuda.flat import flat, vector

model = load_model(sys.argv[1], dtype="bfloat16", device="cpu", backend="torch")
model.cache_dtype = torch.bfloat16
cache = Cache(model.config.layers, model.cache_dtype, model.device)
for unified in (True, False):
    CudaBackend(unified=unified).forward(model, Rows.of(cache.sequence(), [3, 4, 5], 0), None, None)
few, many = (torch.zeros(2, rows, 64, dtype=torch.bfloat16) for rows in (5, 200))
triton_kernel(few, few, few, causal_mask(5, few.dtype, few.device), 0.0)
triton_kernel(many, many, many, "causal", 0.0)
weight = torch.zeros(20000, 4096, dtype=torch.bfloat16)
for product, counts in ((vector, (1, 2, 4)), (flat, (1, 32, 64))):
    for count in counts:
        product(torch.zeros(count, 4096, dtype=torch.bfloat16), weight, None)
flat(torch.zeros(64, 512), torch.zeros(20000, 512), torch.zeros(20000))
"""


def test_kernels_compile(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """In bfloat16, which the interpreter does not know, and within a small GPU's shared memory."""
    folder = make_checkpoint("qwen3", head_dim=64, num_hidden_layers=1).folder
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(folder)], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len({line.split()[0] for line in done.stdout.splitlines()}) == 9


# On a GPU only


@NEEDS_GPU
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_graphs_replay_for_every_pass(make_checkpoint: Callable[..., Any], dtype: str) -> None:
    model = load(make_checkpoint, "qwen3", dtype)
    for turn in range(3):
        agree(model, batch(model), tolerance={"float32": 1e-4, "float16": 0.05, "bfloat16": 0.4}[dtype])
        cache = cache_of(model)
        # Another sequence, another length, the same graph.
        sequence = behind(model, cache, 31 + 7 * turn, turn)
        agree(model, rows_of((sequence, [turn], [31 + 7 * turn], None)), tolerance=0.4)
    assert isinstance(model.backend, CudaBackend)
    assert len(model.backend._graphs) <= 4


@NEEDS_GPU
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_invariance_holds_in_every_row_of_a_piece(make_checkpoint: Callable[..., Any], dtype: str) -> None:
    model = load(make_checkpoint, "llama", dtype, invariant=True)
    cache = cache_of(model)
    sequence = behind(model, cache, 50)
    alone = model.forward(rows_of((sequence, [5], [50], None)))
    for before in range(FIXED):
        filler = [(cache.sequence(), some_tokens(before, 7), list(range(before)), None)] if before else []
        rows = rows_of(*filler, (sequence, [5], [50], None))
        assert torch.equal(model.forward(rows, [before]), alone)


@NEEDS_GPU
def test_a_replay_does_not_wait_for_the_device(make_checkpoint: Callable[..., Any]) -> None:
    model = load(make_checkpoint, "llama")
    sequence = behind(model, cache_of(model), 9)
    rows = rows_of((sequence, [5, 6], [9, 10], None))
    model.forward(rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.forward(rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_refusals(model: Decoder) -> None:
    cuda, config = torch.device("cuda"), model.config
    assert refusal(config, torch.bfloat16, cuda) is None
    assert "CUDA" in str(refusal(config, torch.float32, torch.device("cpu")))
    assert "float32" in str(refusal(config, torch.float64, cuda))
    window = replace(config, layers=(replace(config.layers[0], window=7), *config.layers[1:]))
    assert "windows" in str(refusal(window, torch.float32, cuda))
    uneven = replace(config, layers=(*config.layers[1:], LayerConfig.attention(2, 1, 8, 80)))
    assert "one shape" in str(refusal(uneven, torch.float32, cuda))
