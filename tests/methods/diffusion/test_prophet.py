"""Prophet: one token per pass until the answer has converged, then everything at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from canvases import (
    CONFIGS,
    FULL,
    MASK,
    PROMPTS,
    VOCABULARY,
    by_law,
    by_position,
    canvas_of,
    decode,
    oracle,
    run,
    visible,
)

from hasten.engine import Engine, Request, SamplingParams
from hasten.errors import UserError

NEVER, ALWAYS = (f"prophet:early={gap},middle={gap},late={gap},block=4" for gap in ("1e9", "-1e9"))


class Letters:
    """A tokenizer: a digit is its token."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [int(letter) for letter in text]


def fill(name: str, law: Any, spec: str, prompt: list[int], **params: Any) -> Request:
    return run(Engine(oracle(name, law), Letters()), (prompt, SamplingParams(**params), spec))[0]


def thresholds(early: float, middle: float, late: float) -> str:
    return f"prophet:early={early},middle={middle},late={late},block=4"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 2}], ids=["greedy", "sampled"])
def test_a_gap_that_nothing_reaches(name: str, params: dict[str, Any]) -> None:
    for prompt in PROMPTS[1:4]:
        ours, static = (
            decode(oracle(name), spec, prompt, max_tokens=9, **params) for spec in (NEVER, "denoise:block=4")
        )
        assert canvas_of(ours).ids.tolist() == canvas_of(static).ids.tolist()
        assert canvas_of(ours).committed_at.tolist() == canvas_of(static).committed_at.tolist()


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_gap_that_everything_reaches(name: str, cache: str) -> None:
    """The first pass sees the whole canvas whatever the cache."""
    request = decode(oracle(name), f"{ALWAYS},cache={cache}", PROMPTS[3], max_tokens=13)
    assert request.statistics.steps == 1
    assert len(request.output) == 13


@pytest.mark.parametrize("name", FULL)
def test_the_exit_fills_the_state_before_it(name: str) -> None:
    config, exits = CONFIGS[name], set()
    shift = int(config.alignment == "shifted")
    for prompt in PROMPTS:
        static = canvas_of(decode(oracle(name), "denoise:block=4", prompt, max_tokens=10))
        for gap in (0.3, 0.8, 1.2, 1.8):
            request = decode(oracle(name), thresholds(gap, gap, gap), prompt, max_tokens=10)
            exit_step = request.statistics.steps
            before = static.ids.clone()
            masked = static.committed_at >= exit_step
            before[masked] = config.mask_id
            logits = by_law(name)(before, visible(config, len(before), 0))
            logits[:, config.mask_id] = -torch.inf
            said = logits.argmax(-1)
            places = masked.nonzero().flatten()
            before[places] = said[places - shift]
            assert canvas_of(request).ids.tolist() == before.tolist()
            # And it is the first pass whose gap is large enough: a low quantile over what is masked.
            top = logits.topk(2, -1).values
            gaps = (top[:, 0] - top[:, 1])[places - shift].float()
            assert exit_step == 10 or float(torch.quantile(gaps, 0.1)) >= gap
            exits.add(exit_step)
    assert len(exits) > 4


@pytest.mark.parametrize("name", FULL)
def test_passes_grow_with_each_threshold(name: str) -> None:
    grid = [0.2, 0.8, 1.6, 9.0]
    for phase in range(3):
        steps = []
        for gap in grid:
            levels = [9.0 if other < phase else 1.0 for other in range(3)]
            levels[phase] = gap
            steps.append(decode(oracle(name), thresholds(*levels), PROMPTS[3], max_tokens=12).statistics.steps)
        assert steps == sorted(steps)
        assert steps[0] < steps[-1]


def test_thresholds_fall_with_progress() -> None:
    """A gap of 3 where 5 and 4 were asked: it is enough from two thirds of ten steps on."""
    law = by_position({}, dict.fromkeys(range(30), 3.0))
    assert decode(oracle("full-same", law), thresholds(5, 4, 2.9), PROMPTS[3], max_tokens=10).statistics.steps == 7
    assert decode(oracle("full-same", law), thresholds(5, 2.9, 9), PROMPTS[3], max_tokens=10).statistics.steps == 4
    assert decode(oracle("full-same", law), thresholds(2.9, 9, 9), PROMPTS[3], max_tokens=10).statistics.steps == 1


def test_what_is_behind_the_end_does_not_count() -> None:
    """Positions from 9 on are certainly the end; those before it are not sure enough."""
    law = by_position(dict.fromkeys(range(9, 40), 10), {place: 20.0 if place >= 9 else 1.0 for place in range(40)})
    request = decode(oracle("full-same", law), thresholds(2, 2, 2), PROMPTS[3], end_ids=[10], max_tokens=12)
    assert canvas_of(request).committed_at[5:9].tolist() == [1, 2, 3, 4]
    blind = decode(oracle("full-same", law), thresholds(2, 2, 2) + ",quantile=0.5", PROMPTS[3], max_tokens=12)
    assert blind.statistics.steps == 1


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("gap", [0.0, 1.0, 1e9])
def test_a_suffix_stays(name: str, gap: Any) -> None:
    spec = f"prophet:suffix=123,offset=3,answer=2,early={gap},middle={gap},late={gap},block=4"
    request = fill(name, by_position({}, {}), spec, PROMPTS[3], max_tokens=9)
    assert request.output == [0, 0, 0, 1, 2, 3, 0, 0, 0]
    assert (canvas_of(request).committed_at[8:11] == 0).all()
    assert canvas_of(request).masked.sum() == 0 or name not in FULL
    if gap == 1e9:
        assert request.statistics.steps >= 6


def test_the_answer_is_behind_the_suffix() -> None:
    """Its two positions lead by 4 and 6 nats, the others by none."""
    law = by_position({}, dict.fromkeys(range(30), 0.1) | {11: 4.0, 12: 6.0})
    for gap, steps in ((4.9, 1), (5.1, 7)):
        spec = f"prophet:suffix=123,offset=3,answer=2,early={gap},middle={gap},late={gap},block=9"
        request = fill("full-same", law, spec, PROMPTS[3], max_tokens=10)
        assert request.statistics.steps == steps
        assert len(request.output) == 10


@pytest.mark.parametrize(("cache", "steps"), [("none", 6), ("dual", 7)])
def test_a_pass_fills_what_it_sees(cache: str, steps: int) -> None:
    """Blocks from 5, 9 and 13 on; the suffix is at 9 and 10, the answer at 11 and 12, and sure once 11 is known.

    The sixth pass sees that and fills the canvas; with a dual cache it fills the open block, and the pass that opens
    the last one fills that.
    """

    def law(seen: list[tuple[int, int]], position: int) -> torch.Tensor:
        known = dict(seen).get(11, MASK) != MASK
        return by_position({}, {11: 4.0 if known else 0.2, 12: 4.0 if known else 0.1})(seen, position)

    spec = f"prophet:suffix=12,offset=4,answer=2,early=2,middle=2,late=2,block=4,cache={cache}"
    request = fill("full-same", law, spec, PROMPTS[3], max_tokens=12)
    assert request.statistics.steps == steps
    last = canvas_of(request).committed_at[11:].tolist()
    assert last == [5, 6, *[steps] * 4]


def test_a_suffix_that_does_not_fit_is_refused_at_once() -> None:
    engine = Engine(oracle("full-same"), Letters())
    with pytest.raises(UserError, match="the suffix does not fit"):
        engine.add([1], SamplingParams(max_tokens=6), "prophet:suffix=123,offset=3")
    assert not engine.busy
    engine.add([1], SamplingParams(max_tokens=7), "prophet:suffix=123,offset=3")


@pytest.mark.parametrize("name", CONFIGS)
def test_neighbours_change_nothing(name: str) -> None:
    jobs = [
        (prompt, SamplingParams(max_tokens=5 + number), thresholds(2 - number / 3, 1, 0.4))
        for number, prompt in enumerate(PROMPTS)
    ]
    for job, request in zip(jobs, run(Engine(oracle(name)), *jobs), strict=True):
        (alone,) = run(Engine(oracle(name)), job)
        assert (request.output, request.statistics.steps) == (alone.output, alone.statistics.steps)
        assert max(request.output) < VOCABULARY - 1
