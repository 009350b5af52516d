"""Sequences that begin alike read what they share together, natively: not a bit of any row depends on it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family
from instruction_sets import INSTRUCTION_SETS, chosen
from torch import Tensor

from hasten.cache import Cache, SequenceCache
from hasten.model import Decoder, Rows, Span, load_model
from hasten.model.native.backend import NativeBackend
from hasten.model.native.library import LIBRARY

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the native step was not built: no C++ compiler")

KINDS = {
    "float32": ("llama", {"dtype": "float32"}),
    "bfloat16": ("qwen3", {"dtype": "bfloat16"}),
    "int8": ("llama", {"dtype": "bfloat16", "weights": "int8"}),
    "int4": ("llama", {"dtype": "bfloat16", "weights": "int4"}),
    "windows": ("mistral", {"dtype": "float32"}),
}
WINDOW = {"sliding_window": 50}
TREE = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
DRAFTS: list[tuple[list[int], Tensor | None]] = [
    ([0], None),
    ([0, 1, 1, 2], TREE),
    ([0, 1, 2], None),
    ([0], None),
    (list(range(21)), None),
]
"""Of each its rows' positions, from the end of the text on, and its mask."""


@pytest.fixture(params=KINDS, scope="module")
def model(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Any]) -> Decoder:
    architecture, options = KINDS[request.param]
    settings = WINDOW if architecture == "mistral" else {}
    folder = make_checkpoint(architecture, intermediate_size=80, **settings).folder
    return load_model(folder, device="cpu", backend="native", **options)


def sequences_of(model: Decoder) -> list[SequenceCache]:
    generator = torch.Generator().manual_seed(0)

    def grow(sequence: SequenceCache, count: int) -> None:
        tokens = torch.randint(0, 97, (count,), generator=generator).tolist()
        model.forward(Rows.of(sequence, tokens, sequence.length), ())
        sequence.commit(count)

    return family(Cache(model.config.layers, model.cache_dtype, model.device), grow)


def packed(drafts: list[tuple[SequenceCache, list[int], Tensor | None]]) -> Rows:
    """A pass of drafts, whose tokens follow from where they stand."""
    positions: list[int] = []
    spans = []
    for sequence, offsets, mask in drafts:
        spans.append(Span(sequence, len(positions), len(positions) + len(offsets), mask))
        positions += [sequence.length + offset for offset in offsets]
    places = torch.tensor(positions)
    return Rows(places * 31 % 97, places, spans)


def check(model: Decoder, threads: int = 1) -> None:
    """Each draft has the same logits among all and among some, in any order, as alone."""
    drafts = [(each, *DRAFTS[number % len(DRAFTS)]) for number, each in enumerate(sequences_of(model))]
    known = torch.get_num_threads()
    try:
        alone = [model.forward(packed([draft])) for draft in drafts]
        torch.set_num_threads(threads)
        generator = random.Random(threads)
        for count in (len(drafts), len(drafts), 7, 5, 3, 2):
            numbers = generator.sample(range(len(drafts)), count)
            together = model.forward(packed([drafts[number] for number in numbers]))
            assert torch.equal(together, torch.cat([alone[number] for number in numbers]))
    finally:
        torch.set_num_threads(known)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_sharing_changes_no_bit(model: Decoder, threads: int) -> None:
    check(model, threads)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_nor_in_any_instruction_set(name: str, make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    with chosen(name, LIBRARY, tmp_path) as available:
        if not available:
            pytest.skip(f"{name} is not here")
        # Heads of 16 channels, and of 24, which no vectors fill.
        for width in (16, 24):
            check(load_model(make_checkpoint("qwen3", head_dim=width).folder, "float32", "cpu", "native"))


def test_what_is_shared_is_read_once(make_checkpoint: Callable[..., Any]) -> None:
    """Where the shared block's values lie elsewhere for one of three sequences, either nobody notices, or all do."""
    model = load_model(make_checkpoint("llama").folder, "float32", "cpu", "native")
    assert isinstance(model.backend, NativeBackend)
    root, *_ = sequences_of(model)
    sequences = [root.fork() for _ in range(3)]
    rows = packed([(sequence, [0], None) for sequence in sequences])
    expected = model.forward(rows)
    (block, _), *_ = root.memory(0) or []
    nothing = torch.full_like(block.values, torch.nan)
    found = []
    for sequence in sequences:
        view = model.backend._slots[sequence]._views[0][0]
        view.values = nothing.data_ptr()
        noticed = model.forward(rows).isnan().any(1).tolist()
        view.values = block.values.data_ptr()
        found.append(noticed)
    assert sorted(found) == [[False] * 3, [False] * 3, [True] * 3]
    assert torch.equal(model.forward(rows), expected)


def test_little_in_common_is_read_by_each(make_checkpoint: Callable[..., Any]) -> None:
    """Below the threshold, a sequence's block is its own business."""
    model = load_model(make_checkpoint("llama").folder, "float32", "cpu", "native")
    assert isinstance(model.backend, NativeBackend)
    sequence = Cache(model.config.layers, model.cache_dtype, model.device).sequence()
    model.forward(Rows.of(sequence, [5] * 63, 0), ())
    sequence.commit(63)
    sequences = [sequence.fork() for _ in range(3)]
    rows = packed([(each, [0], None) for each in sequences])
    model.forward(rows)
    (block, _), *_ = sequence.memory(0) or []
    nothing = torch.full_like(block.values, torch.nan)
    for number, each in enumerate(sequences):
        view = model.backend._slots[each]._views[0][0]
        view.values = nothing.data_ptr()
        assert model.forward(rows).isnan().any(1).tolist() == [number == other for other in range(3)]
        view.values = block.values.data_ptr()
