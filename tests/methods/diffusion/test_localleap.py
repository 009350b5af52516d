"""LocalLeap's rule, against its definition position by position, and its limits."""

from __future__ import annotations

import random
from typing import Any

import pytest
from canvases import CONFIGS, PROMPTS, canvas_of, committed, decode, oracle, view_of

from hasten.engine import Engine
from hasten.methods.diffusion.localleap import LocalLeap
from hasten.methods.diffusion.threshold import Threshold

NOBODY: Any = None


def method(spec: str) -> Any:
    return Engine(oracle("full-same")).drafter(spec)[1]


def brute_force(
    confidence: list[float], masked: list[bool], active: int, anchor: float, relaxed: float, radius: int
) -> set[int]:
    """Position by position."""
    rows = [row for row in range(active) if masked[row]]
    anchors = [row for row in rows if confidence[row] >= anchor]
    chosen = {max(rows, key=lambda row: (confidence[row], -row))}
    for row in rows:
        near = any(abs(row - each) <= radius for each in anchors)
        if confidence[row] >= (relaxed if near else anchor):
            chosen.add(row)
    return chosen


def test_the_worked_example() -> None:
    confidence = [0.62, 0.78, 0.95, 0.80, 0.70, 0.77, 0.76, 0.40]
    view = view_of(confidence)
    method("localleap:anchor=0.9,relaxed=0.75,radius=2").update(NOBODY, view)
    assert committed(view) == {1, 2, 3}
    view = view_of(confidence)
    method("threshold:threshold=0.9").update(NOBODY, view)
    assert committed(view) == {2}


def test_any_confidences_by_the_definition_and_between_two_thresholds() -> None:
    rng = random.Random(0)
    rules = [(0.9, 0.75, 4), (0.9, 0.6, 1), (0.8, 0.0, 2), (0.95, 0.9, 8), (0.7, 0.7, 3), (0.9, 0.5, 0)]
    leaps: list[tuple[LocalLeap, Threshold, Threshold]] = [
        (
            method(f"localleap:anchor={anchor},relaxed={relaxed},radius={radius}"),
            method(f"threshold:threshold={anchor}"),
            method(f"threshold:threshold={relaxed}"),
        )
        for anchor, relaxed, radius in rules
    ]
    wider = 0
    for number in range(400):
        count = rng.randint(1, 16)
        confidence = [rng.choice((rng.uniform(0.2, 1.0), rng.uniform(0.7, 0.99))) for _ in range(count)]
        masked = [rng.random() < 0.8 for _ in range(count)]
        active = rng.randint(1, count)
        masked[rng.randrange(active)] = True
        views = [view_of(confidence, masked, active) for _ in range(3)]
        for policy, view in zip(leaps[number % len(rules)], views, strict=True):
            policy.update(NOBODY, view)
        leap, strict, loose = map(committed, views)
        assert leap == brute_force(confidence, masked, active, *rules[number % len(rules)])
        assert strict <= leap <= loose
        wider += strict < leap < loose
    assert wider > 15


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("spec", "other"),
    [
        ("localleap:anchor=0.5,relaxed=0.2,radius=0", "threshold:threshold=0.5"),
        ("localleap:anchor=0.5,relaxed=0.5", "threshold:threshold=0.5"),
        ("localleap:anchor=1.1", "denoise:per_step=1"),
    ],
)
def test_its_limits(name: str, spec: str, other: str) -> None:
    """Token for token, pass for pass."""
    for prompt in PROMPTS[::2]:
        ours, theirs = (decode(oracle(name), f"{each},block=8", prompt, max_tokens=12) for each in (spec, other))
        assert canvas_of(ours).ids.tolist() == canvas_of(theirs).ids.tolist()
        assert canvas_of(ours).committed_at.tolist() == canvas_of(theirs).committed_at.tolist()
        assert ours.statistics.steps == theirs.statistics.steps
