"""A canvas: what is masked is stored, what is decided stays, and what is final is handed out once."""

from __future__ import annotations

import random

import pytest
import torch

from hasten.engine import Canvas, SamplingParams
from hasten.engine.sampling.sampler import Sampler

MASK = 9


def new_canvas(prompt: list[int], length: int, **params: float) -> Canvas:
    return Canvas(prompt, length, MASK, Sampler(SamplingParams(seed=0, **params), 0, prompt, 10), end_ids=[2, 1])  # type: ignore[arg-type]


def commit(canvas: Canvas, *places: int, token: int = 5) -> None:
    canvas.commit(torch.tensor(places), torch.full((len(places),), token))


def test_the_mask_token_in_a_prompt_is_not_a_mask() -> None:
    canvas = new_canvas([3, MASK, 4], 6)
    assert canvas.ids.tolist() == [3, MASK, 4, MASK, MASK, MASK]
    assert canvas.masked.tolist() == [False] * 3 + [True] * 3
    assert (canvas.masks(), canvas.masks(0, 4), canvas.masks(4), canvas.masks(2, 100)) == (3, 1, 2, 3)
    assert canvas.end_ids.tolist() == [1, 2]


def test_a_decision_is_final() -> None:
    canvas = new_canvas([3], 4)
    canvas.steps = 2
    commit(canvas, 2)
    assert canvas.committed_at.tolist() == [0, 0, 2, 0]
    for place in (0, 2):
        with pytest.raises(AssertionError, match="never changed"):
            commit(canvas, place)


def test_penalties_hear_of_what_is_decided() -> None:
    canvas = new_canvas([3], 4, frequency_penalty=1.0)
    commit(canvas, 1, 3)
    logits = torch.zeros(1, 10)
    assert canvas.sampler.adjusted(logits, [()])[0, 5] == -2


def test_what_is_final_comes_once_and_in_order() -> None:
    """Any order of decisions, with a cut or without."""
    rng = random.Random(0)
    for _ in range(50):
        length = rng.randint(2, 12)
        canvas, came = new_canvas([7, 8], 2 + length), []
        cut = rng.choice([None, rng.randint(0, length - 1)])
        places = rng.sample(range(2, 2 + length), length)
        for number, place in enumerate(places):
            if number == cut:
                canvas.truncate(max(place, 3))
            if place >= canvas.length:
                continue
            commit(canvas, place, token=place % 9)
            came += canvas.fresh()
            first = next((place for place in range(2, canvas.length) if canvas.masked[place]), canvas.length)
            # A cut takes nothing back that was handed out.
            assert len(came) >= first - 2
            assert came == [place % 9 for place in range(2, 2 + len(came))]
        assert canvas.finished
        assert canvas.fresh() == []


def test_a_cut_only_shortens() -> None:
    canvas = new_canvas([3], 8)
    canvas.truncate(5)
    canvas.truncate(7)
    assert (canvas.length, canvas.masks()) == (5, 4)
    commit(canvas, 1, 2, 3, 4)
    assert canvas.fresh() == [5] * 4
    assert canvas.finished
