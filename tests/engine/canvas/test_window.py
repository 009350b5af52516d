"""Windows: which rows a look computes, what these see, and what the cache keeps."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch

from hasten.cache import Cache, SequenceCache
from hasten.engine import BlockWindow, Canvas, FullWindow, Hypothesis, SamplingParams, View
from hasten.engine.passage import Passage
from hasten.engine.sampling.sampler import Sampler
from hasten.model import DiffusionConfig, LayerConfig

MASK, VOCABULARY = 9, 10


def new_canvas(prompt: int, length: int) -> Canvas:
    tokens = list(range(1, 1 + prompt))
    return Canvas(tokens, length, MASK, Sampler(SamplingParams(seed=0), 0, tokens, VOCABULARY))


def new_sequence() -> SequenceCache:
    layers = (LayerConfig.attention(heads=1, kv_heads=1, head_dim=1, ffn=0),)
    return Cache(layers, torch.float32, torch.device("cpu")).sequence()


class Pass:
    """Stands for model and engine: computes nothing, but lets the sequence know the rows."""

    def __init__(self, sequence: SequenceCache) -> None:
        self.sequence, self.made = sequence, list[Passage]()

    def __call__(self, passes: Generator[Passage, torch.Tensor, Any]) -> Any:
        """Runs a look to its end; its views."""
        try:
            passage = next(passes)
            while True:
                self.made.append(passage)
                self.sequence.begin(torch.tensor(list(passage.positions)))
                passage = passes.send(torch.zeros(len(passage.wanted), VOCABULARY))
        except StopIteration as stop:
            return stop.value

    @property
    def slots(self) -> list[int]:
        """Positions in the cache."""
        blocks = self.sequence.memory(0) or []
        return [place for block, length in blocks for place in block.positions[:length].tolist()]


def full(alignment: Any, cache: str = "none", refresh: int = 0) -> tuple[FullWindow, Pass]:
    """Four tokens of prompt, ten masks, blocks of four."""
    sequence, config = new_sequence(), DiffusionConfig("full", alignment, MASK)
    return FullWindow(new_canvas(4, 14), sequence, config, 4, cache, refresh), Pass(sequence)


def block(attention: Any, alignment: Any, prompt: int = 6, parts: bool = False) -> tuple[BlockWindow, Pass]:
    sequence, config = new_sequence(), DiffusionConfig(attention, alignment, MASK, 4)
    return BlockWindow(new_canvas(prompt, 14), sequence, config, parts), Pass(sequence)


def check(view: View, start: int, rows: int, active: int) -> None:
    assert (view.start, len(view.masked), view.active) == (start, rows, active)


@pytest.mark.parametrize(("alignment", "shift"), [("same", 0), ("shifted", 1)])
def test_full_without_a_cache(alignment: str, shift: int) -> None:
    window, run = full(alignment)
    assert list(window.blocks()) == [(4, 8), (8, 12), (12, 14)]
    run(window.open(8, 12))
    (view,) = run(window.look(8, 12))
    check(view, 8, 4, 4)
    (passage,) = run.made
    assert list(passage.positions) == list(range(14))
    assert list(passage.wanted) == [place - shift for place in range(8, 12)]
    assert (passage.mask, run.slots) == ("all", [])
    (view,) = run(window.look(8, 10, beyond=True))
    check(view, 8, 6, 2)


@pytest.mark.parametrize(("alignment", "shift"), [("same", 0), ("shifted", 1)])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_full_with_a_stale_cache(alignment: str, shift: int, cache: str) -> None:
    window, run = full(alignment, cache, refresh=2)
    run(window.open(4, 8))
    behind = list(range(8, 14)) if cache == "dual" else []
    for whole in (True, False, True):
        (view,) = run(window.look(4, 8))
        check(view, 4, 4, 4)
        positions = list(run.made[-1].positions)
        assert positions == (list(range(14)) if whole else list(range(4 - shift, 8 if cache == "dual" else 14)))
        assert [positions[row] + shift for row in run.made[-1].wanted] == [4, 5, 6, 7]
        assert run.slots == [*range(4 - shift), *behind]
    run(window.open(8, 12))
    run(window.look(8, 12))
    assert run.slots == [*range(8 - shift), *behind[4:]]


def test_a_cut_in_full() -> None:
    window, run = full("same", "dual")
    run(window.open(4, 8))
    run(window.look(4, 8))
    window.canvas.truncate(10)
    run(window.look(4, 8))
    assert run.slots == [*range(4), 8, 9]
    assert list(window.blocks()) == [(4, 8), (8, 10)]
    window.canvas.truncate(6)
    (view,) = run(window.look(4, 8))
    check(view, 4, 2, 2)
    assert list(run.made[-1].positions) == [4, 5]
    assert run.slots == [*range(4)]


def hypotheses(window: Any, count: int) -> list[Hypothesis]:
    start, stop = window.start, window.stop
    return [
        Hypothesis(start, torch.full((stop - start,), token), window.canvas.masked[start:stop], ())
        for token in range(count)
    ]


@pytest.mark.parametrize(
    ("window", "run", "bottom", "top"),
    [
        pytest.param(*full("same"), 0, 14, id="full"),
        pytest.param(*full("shifted", "prefix"), 7, 14, id="prefix"),
        pytest.param(*full("same", "dual"), 8, 12, id="dual"),
        pytest.param(*block("block-causal", "same"), 8, 12, id="block"),
    ],
)
def test_hypotheses_see_nothing_of_each_other(window: Any, run: Pass, bottom: int, top: int) -> None:
    run(window.open(8, 12))
    run(window.look(8, 12))
    slots = run.slots
    views = run(window.look(8, 12, hypotheses(window, 3)))
    passage, size = run.made[-1], top - bottom
    assert list(passage.positions) == list(range(bottom, top)) * 3
    assert isinstance(passage.mask, torch.Tensor)
    assert torch.equal(passage.mask, torch.block_diag(*[torch.ones(size, size)] * 3).bool())
    inside = 8 - bottom
    for token in range(3):
        own = list(passage.tokens)[token * size : (token + 1) * size]
        assert own[inside : inside + 4] == [token] * 4
        assert own[:inside] + own[inside + 4 :] == [
            *window.canvas.ids[bottom:8].tolist(),
            *window.canvas.ids[12:top].tolist(),
        ]
        check(views[token], 8, 4, 4)
    assert run.slots == slots


def test_blocks_are_counted_from_where_the_attention_says() -> None:
    assert list(block("block-causal", "same")[0].blocks()) == [(4, 8), (8, 12), (12, 14)]
    assert list(block("context-causal", "same")[0].blocks()) == [(6, 10), (10, 14)]
    assert list(block("block-causal", "same", prompt=8)[0].blocks()) == [(8, 12), (12, 14)]
    assert list(block("block-causal", "same", prompt=3)[0].blocks()) == [(0, 4), (4, 8), (8, 12), (12, 14)]


@pytest.mark.parametrize("alignment", ["same", "shifted"])
@pytest.mark.parametrize("attention", ["block-causal", "context-causal"])
def test_finished_text_is_read_as_the_attention_says(attention: str, alignment: str) -> None:
    window, run = block(attention, alignment)
    first, second = list(window.blocks())[:2]
    run(window.open(*first))
    passage = run.made[0]
    assert passage.prompt
    assert list(passage.positions) == run.slots == list(range(first[0]))
    # The prompt reaches into the block, unless blocks begin behind it: then its last row says what comes first.
    says = attention == "context-causal" and alignment == "shifted"
    assert list(passage.wanted) == ([first[0] - 1] if says else [])
    assert bool(window.canvas.masked[first[0]]) == (attention == "context-causal" and not says)
    open_ = window.canvas.masked[: first[1]].nonzero().flatten()
    window.canvas.commit(open_, torch.full_like(open_, 3))
    run(window.open(*second))
    passage = run.made[-1]
    assert not passage.prompt
    assert list(passage.positions) == list(range(*first))
    assert list(passage.wanted) == ([3] if alignment == "shifted" else [])
    assert window.canvas.masked[second[0]] == (alignment == "same")
    if attention == "context-causal":
        assert passage.mask is None
    else:
        assert passage.mask is not None and torch.as_tensor(passage.mask).all()


def test_long_prompts_are_read_in_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.engine.canvas.window.CHUNK", 7)
    sequence = new_sequence()
    window = BlockWindow(new_canvas(11, 14), sequence, DiffusionConfig("block-causal", "same", MASK, 2))
    run = Pass(sequence)
    run(window.open(10, 12))
    assert [list(passage.positions) for passage in run.made] == [list(range(6)), list(range(6, 10))]
    mask = run.made[0].mask
    assert isinstance(mask, torch.Tensor)
    assert mask.tolist() == [[column // 2 <= row // 2 for column in range(6)] for row in range(6)]


@pytest.mark.parametrize(("alignment", "shift"), [("same", 0), ("shifted", 1)])
def test_the_open_block_is_looked_at_whole_and_leaves_nothing(alignment: str, shift: int) -> None:
    window, run = block("block-causal", alignment, prompt=8)
    run(window.open(8, 12))
    (view,) = run(window.look(8, 12))
    check(view, 8 + shift, 4 - shift, 4 - shift)
    assert list(run.made[-1].wanted) == list(range(4 - shift))
    assert (run.made[-1].mask, run.slots) == ("all", list(range(8)))
    (view,) = run(window.look(8, 10, beyond=True))
    check(view, 8 + shift, 4 - shift, 2 - shift)
    window.canvas.truncate(11)
    (view,) = run(window.look(8, 12))
    check(view, 8 + shift, 3 - shift, 3 - shift)
    assert list(run.made[-1].positions) == [8, 9, 10]


@pytest.mark.parametrize(("alignment", "shift"), [("same", 0), ("shifted", 1)])
def test_parts_of_a_block_over_a_stale_rest(alignment: str, shift: int) -> None:
    """Whole where the part's first position is open, then the part alone, whose slots are made anew."""
    window, run = block("context-causal", alignment, prompt=8, parts=True)
    run(window.open(8, 12))
    run(window.look(8, 10))
    assert sorted(run.slots) == list(range(12))
    if window.canvas.masked[8]:
        window.canvas.commit(torch.tensor([8]), torch.tensor([1]))
    (view,) = run(window.look(8, 10))
    check(view, 8 + shift, 2 - shift, 2 - shift)
    assert list(run.made[-1].positions) == [8, 9]
    assert run.slots == [*range(8), 10, 11, 8, 9]
    window.canvas.commit(torch.tensor([9]), torch.tensor([1]))
    run(window.look(10, 12))
    assert list(run.made[-1].positions) == [8, 9, 10, 11]
    assert run.slots == list(range(12))
    window.canvas.commit(torch.tensor([10, 11]), torch.tensor([1, 1]))
    run(window.open(12, 14))
    assert run.slots == list(range(12))
    assert list(run.made[-1].positions) == [8, 9, 10, 11]
