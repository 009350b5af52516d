"""Attention over what several sequences share, in PyTorch: the softmax over all that each row sees, written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families import family
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hasten.cache import Cache, SequenceCache
from hasten.model import LayerConfig, Rows, Span, load_model, sharing
from hasten.model.attention import additive
from hasten.model.sharing import attend_spans, levels

LAYERS = 2
SLOTS = 64
"""That spans must share, here."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


@pytest.fixture(scope="module", autouse=True)
def few_slots() -> Iterator[None]:
    """Families are small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "LEAST", SLOTS)
        yield


class Sequences:
    """Sequences of random keys and values, and spans behind them."""

    def __init__(self, heads: int, kv_heads: int, width: int, dtype: torch.dtype, seed: int = 0) -> None:
        self.heads, self.kv_heads, self.width, self.dtype = heads, kv_heads, width, dtype
        layers = [LayerConfig.attention(heads, kv_heads, width, 8)] * LAYERS
        self.cache = Cache(layers, dtype, torch.device("cpu"))
        self._generator = torch.Generator().manual_seed(seed)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64).to(self.dtype)

    def grow(self, sequence: SequenceCache, count: int) -> None:
        sequence.begin(torch.arange(sequence.length, sequence.length + count))
        for layer in range(LAYERS):
            sequence.write(layer, *self.noise(2, self.kv_heads, count, self.width))
        sequence.commit(count)

    def check(self, sequences: list[SequenceCache], rows: list[int]) -> None:
        """Spans of so many rows, of which every other one has a mask, attend as the softmax says."""
        spans: list[Span] = []
        for number, (sequence, count) in enumerate(zip(sequences, rows, strict=True)):
            start = spans[-1].stop if spans else 0
            mask = torch.eye(count, dtype=torch.bool) if number % 2 and count > 1 else None
            spans.append(Span(sequence, start, start + count, mask))
            sequence.begin(torch.arange(count) + sequence.length)
        total = spans[-1].stop
        masks = [None if span.mask is None else additive(span.mask, self.dtype) for span in spans]
        for layer in range(LAYERS):
            queries = self.noise(total, self.heads, self.width)
            keys, values = self.noise(2, total, self.kv_heads, self.width)
            out = attend_spans(spans, masks, layer, queries, keys, values, levels(spans, layer))
            for span in spans:
                expected = self.written_out(span, layer, queries[span.start : span.stop])
                torch.testing.assert_close(
                    out[span.start : span.stop].double(), expected, atol=TOLERANCE[self.dtype], rtol=0
                )

    def written_out(self, span: Span, layer: int, queries: Tensor) -> Tensor:
        """[rows, heads * width] in float64."""
        count = span.stop - span.start
        views = list(span.sequence.memory(0) or [])
        lengths = [length for _, length in views]
        lengths[-1] += count
        keys, values = (
            torch.cat(
                [getattr(block, which)[layer][:, :length] for (block, _), length in zip(views, lengths, strict=True)], 1
            )
            for which in ("keys", "values")
        )
        own = torch.ones(count, count, dtype=torch.bool).tril() if span.mask is None else span.mask
        seen = torch.cat([torch.ones(count, keys.shape[1] - count, dtype=torch.bool), own], 1)
        group = self.heads // self.kv_heads
        keys, values = (each.double().repeat_interleave(group, 0) for each in (keys, values))
        scores = torch.einsum("rhd,hsd->hrs", queries.double(), keys) / self.width**0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hrs,hsd->rhd", weights, values).flatten(1)


@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    ratio=st.sampled_from([1, 2, 4]),
    kv_heads=st.integers(1, 2),
    width=st.sampled_from([5, 16]),
    rows=st.lists(st.sampled_from([1, 1, 5]), min_size=11, max_size=11),
    order=st.permutations(range(11)),
    count=st.integers(1, 11),
    seed=st.integers(0, 1000),
)
def test_attention_is_that_over_all_slots(dtype, ratio, kv_heads, width, rows, order, count, seed) -> None:
    made = Sequences(kv_heads * ratio, kv_heads, width, dtype, seed)
    sequences = family(made.cache, made.grow)
    made.check([sequences[number] for number in order[:count]], rows[:count])


def test_slots_that_are_read() -> None:
    """P + b u slots are read instead of b (P + u); below, what only some share is read once for these."""
    made = Sequences(2, 1, 4, torch.float64)
    root = made.cache.sequence()
    made.grow(root, 200)
    first, second = root.fork(), root.fork()
    made.grow(first, 100)
    sequences = [first.fork() for _ in range(3)] + [second.fork() for _ in range(5)]
    for sequence in sequences:
        made.grow(sequence, 10)
    spans = [Span(sequence, number, number + 1) for number, sequence in enumerate(sequences)]
    shared = levels(spans, 1)
    assert [(level.stop - level.start, len(level.spans)) for level in shared] == [(200, 8), (100, 3)]
    own = sum(sequence.length for sequence in sequences) - sum(
        len(each.spans) * (each.stop - each.start) for each in shared
    )
    assert own == 8 * 10
    made.check(sequences, [1] * 8)


def test_what_is_not_shared() -> None:
    """Too few slots, a sequence alone, and equal texts that were read apart."""
    made = Sequences(2, 1, 4, torch.float64)
    sequences = [made.cache.sequence() for _ in range(3)]
    for sequence, count in zip(sequences, (SLOTS - 1, SLOTS, SLOTS), strict=True):
        made.grow(sequence, count)
    forks = [*sequences, sequences[0].fork()]
    spans = [Span(sequence, number, number + 1) for number, sequence in enumerate(forks)]
    assert levels(spans, 0) == []
    (level,) = levels([*spans, Span(sequences[1].fork(), 4, 5)], 0)
    assert (level.start, level.stop, level.spans) == (0, SLOTS, (1, 4))


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_logits_are_those_of_each_alone(architecture: str, make_checkpoint: Callable[..., Any]) -> None:
    """Layers with windows share nothing."""
    settings = {"sliding_window": 50} if architecture == "mistral" else {}
    model = load_model(make_checkpoint(architecture, **settings).folder, "float64", "cpu", "torch")

    def grow(sequence: SequenceCache, count: int) -> None:
        tokens = [(sequence.length + 3 * place) % 97 for place in range(count)]
        model.forward(Rows.of(sequence, tokens, sequence.length), ())
        sequence.commit(count)

    sequences = family(Cache(model.config.layers, model.cache_dtype, model.device), grow)
    chains = [([5] * (1 + number % 3), sequence.length) for number, sequence in enumerate(sequences)]
    alone = [model.forward(Rows.of(each, *chain)) for each, chain in zip(sequences, chains, strict=True)]
    together = model.forward(Rows.of_several((each, *chain) for each, chain in zip(sequences, chains, strict=True)))
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
