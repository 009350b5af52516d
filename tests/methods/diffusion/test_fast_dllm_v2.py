"""Fast-dLLM v2: parts of blocks, an exact cache of finished ones, and a stale one of the open block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from canvases import BLOCKS, PROMPTS, by_position, canvas_of, decode, oracle, run

from hasten.cache import Cache
from hasten.engine import BlockWindow, Engine, SamplingParams
from hasten.model import Rows, Span, load_model

Models = Callable[..., Any]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 7}], ids=["greedy", "sampled"])
def test_a_threshold_of_one_is_one_token_per_pass(name: str, params: dict[str, Any]) -> None:
    for prompt in PROMPTS:
        ours, static = (
            canvas_of(decode(oracle(name), spec, prompt, max_tokens=9, **params))
            for spec in ("fast-dllm-v2:threshold=1,part=2", "denoise:part=2")
        )
        assert ours.ids.tolist() == static.ids.tolist()
        assert ours.committed_at.tolist() == static.committed_at.tolist()


@pytest.mark.parametrize("name", ["block-causal-shifted", "context-causal-shifted"])
def test_blocks_of_one_token_are_autoregression(name: str, models: Models, make_checkpoint: Callable[..., Any]) -> None:
    """The same weights, not adapted to anything."""
    plain = load_model(make_checkpoint("llama", num_hidden_layers=2).folder, dtype="float64", device="cpu")
    pair = models(name, 1)
    # A word for the one, the mask for the other.
    bias = {pair.config.mask_id: -1e9}
    for sampling in ({}, {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.2}):
        jobs = [(prompt, SamplingParams(max_tokens=12, logit_bias=bias, **sampling)) for prompt in PROMPTS]
        expected = run(Engine(plain), *[(*job, "plain") for job in jobs])
        for request, theirs in zip(
            run(Engine(pair.model), *[(*job, "fast-dllm-v2:threshold=1") for job in jobs]), expected, strict=True
        ):
            assert request.output == theirs.output
            assert request.statistics.steps == 12


def blocks_opened(monkeypatch: pytest.MonkeyPatch, check: Callable[[BlockWindow], None]) -> list[int]:
    """Calls `check` whenever a block is open; the blocks' starts."""
    starts: list[int] = []
    opened = BlockWindow.open

    def spy(self: BlockWindow, start: int, stop: int) -> Iterator[Any]:
        yield from opened(self, start, stop)
        assert self.sequence.length == start
        check(self)
        starts.append(start)

    monkeypatch.setattr(BlockWindow, "open", spy)
    return starts


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("method", ["fast-dllm-v2:part=2,threshold=0.3", "fast-dllm-v2:part=2,block_cache=true"])
def test_finished_blocks_are_cached_as_if_read_at_once(
    name: str, method: str, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of all layers, and nothing of the open block."""
    pair = models(name)

    def check(window: BlockWindow) -> None:
        length = window.sequence.length
        if not length:
            return
        fresh = Cache(pair.model.config.layers, pair.model.cache_dtype, pair.model.device).sequence()
        rows = Rows.of(fresh, window.canvas.ids[:length].tolist(), 0)
        if pair.config.attention == "block-causal":
            number = torch.arange(length) // 4
            rows.spans = [Span(fresh, 0, length, number[:, None] >= number[None, :])]
        pair.model.forward(rows)
        fresh.commit(length)
        ((ours, filled),), ((theirs, _),) = window.sequence.memory(0), fresh.memory(0)
        assert ours.positions[:filled].tolist() == list(range(length))
        for one, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(one[:, :, :length], other[:, :, :length], atol=1e-9, rtol=0)

    starts = blocks_opened(monkeypatch, check)
    for prompt in PROMPTS[1:4]:
        decode(pair.model, method, prompt, max_tokens=11)
    assert len(starts) >= 9


@pytest.mark.parametrize("name", BLOCKS)
def test_a_part_as_long_as_the_block_leaves_nothing_stale(name: str) -> None:
    for prompt in PROMPTS:
        on, off = (
            decode(oracle(name), f"fast-dllm-v2:part=4,threshold=0.4,block_cache={cache}", prompt, max_tokens=11)
            for cache in ("true", "false")
        )
        assert on.output == off.output
        assert (on.statistics.steps, on.statistics.rows) == (off.statistics.steps, off.statistics.rows)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_open_part_alone_is_computed(name: str) -> None:
    """Behind a block of the prompt, one block: a look at all of it where a part's first position is open."""
    law = by_position({}, {place: 20.0 - place for place in range(20)})
    rows = {}
    for cache in ("true", "false"):
        model = oracle(name, law)
        request = decode(model, f"fast-dllm-v2:part=2,threshold=1,block_cache={cache}", PROMPTS[2], max_tokens=4)
        assert request.output == [0] * 4
        rows[cache] = model.rows()
    looks = 3 if "shifted" in name else 4
    assert rows["false"] == [4] + [4] * looks
    # Shifted: position 4 is known, 5 needs a look, then 6 is open, then 7. Otherwise 4 and 6 need one each.
    assert rows["true"] == ([4, 4, 4, 2] if looks == 3 else [4, 4, 2, 4, 2])


@pytest.mark.parametrize("name", BLOCKS)
def test_what_a_part_sees_of_the_rest(name: str, models: Models) -> None:
    """Its tokens are those of the last look at all of the block: a law of tokens knows no difference. Deeper layers of
    a network do."""
    specs = [f"fast-dllm-v2:part=2,threshold=1,block_cache={cache}" for cache in ("true", "false")]
    saved = 0
    for prompt in PROMPTS:
        on, off = (decode(oracle(name), spec, prompt, max_tokens=12) for spec in specs)
        assert on.output == off.output
        saved += off.statistics.rows - on.statistics.rows
    assert saved > 0
    model = models(name, 8).model
    wider = [spec.replace("part=2", "part=4") for spec in specs]
    on, off = ([decode(model, spec, prompt, max_tokens=12) for prompt in PROMPTS] for spec in wider)
    assert all(len(request.output) == 12 for request in on)
    assert any(one.output != other.output for one, other in zip(on, off, strict=True))
