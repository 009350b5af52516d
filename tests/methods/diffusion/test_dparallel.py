"""dParallel's rule: all tokens of little entropy at once."""

from __future__ import annotations

import math
from typing import Any

import pytest
from canvases import CONFIGS, PROMPTS, canvas_of, committed, decode, oracle, view_of

from hasten.engine import Engine

NOBODY: Any = None


@pytest.mark.parametrize("name", CONFIGS)
def test_no_entropy_is_negative(name: str) -> None:
    """So one token comes per pass, that of least entropy."""
    for prompt in PROMPTS[::2]:
        ours = decode(oracle(name), "dparallel:entropy=-0.1,block=4", prompt, max_tokens=9)
        static = decode(oracle(name), "denoise:order=entropy,block=4", prompt, max_tokens=9)
        assert canvas_of(ours).ids.tolist() == canvas_of(static).ids.tolist()
        assert canvas_of(ours).committed_at.tolist() == canvas_of(static).committed_at.tolist()


@pytest.mark.parametrize(
    ("name", "passes"),
    [("full-same", 3), ("full-shifted", 3), ("block-causal-same", 5), ("context-causal-shifted", 6)],
)
def test_every_entropy_is_below_the_threshold(name: str, passes: int) -> None:
    """A pass per block, for 12 positions behind 4; further ones bring a block into the cache, or read the prompt and
    say what the first token is."""
    request = decode(oracle(name), "dparallel:entropy=1e9,block=4", PROMPTS[2], max_tokens=12)
    assert request.statistics.steps == passes


def test_the_threshold_is_in_nats() -> None:
    """Ten tokens share what the likeliest leaves."""
    confidence = [0.99, 0.9, 0.8, 0.5]
    entropies = [-c * math.log(c) - (1 - c) * math.log((1 - c) / 10) for c in confidence]
    for count, threshold in ((2, (entropies[1] + entropies[2]) / 2), (3, (entropies[2] + entropies[3]) / 2)):
        view = view_of(confidence)
        Engine(oracle("full-same")).drafter(f"dparallel:entropy={threshold}")[1].update(NOBODY, view)  # type: ignore[attr-defined]
        assert committed(view) == set(range(count))
