"""Chains behind candidates: each is what the small model would draft if it began there, and one of them is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten import SamplingParams
from hasten.engine.sampling.bans import Bans
from hasten.methods.drafters.small_model import SmallCheckpoint
from hasten.methods.systems.rollouts import Opening, Rollouts
from hasten.model import Rows
from helpers import VOCABULARY

PROMPT = [number * 13 % 140 + 2 for number in range(1, 24)]
KINDS = {
    "greedy": SamplingParams(seed=4),
    "sampled": SamplingParams(temperature=0.9, seed=4),
    "penalties": SamplingParams(temperature=0.9, seed=4, repetition_penalty=1.3, frequency_penalty=0.5),
    "bans": SamplingParams(seed=4, bad_words=((40,), (17, 5)), min_tokens=9),
}


@pytest.fixture(params=[0, 2], ids=["alone", "streams"])
def made(tiny: Path, request: pytest.FixtureRequest):
    """made(length=4, confidence=0, width=3): the small model beside the target, with and without its streams."""

    def make(length: int = 4, confidence: float = 0.0, width: int = 3) -> Rollouts:
        checkpoint = SmallCheckpoint(Path(f"{tiny}-draft"), "float32", "cpu", "auto")
        return Rollouts(checkpoint, tiny, frozenset({1}), length, confidence, width, request.param)

    return make


def opening(params: SamplingParams, tokens: list[int] = PROMPT, left: int = 50, number: int = 0) -> Opening:
    words = {word for word in params.bad_words if not isinstance(word, str)}
    return Opening(number, list(tokens), params, 0, VOCABULARY, Bans({1}, params.min_tokens, words), left)


def anew(rollouts: Rollouts, params: SamplingParams, came: list[int], left: int = 50) -> list[int]:
    """The window behind tokens that came, from the start on."""
    rollouts.open(opening(params, left=left))
    windows, _ = rollouts.windows([(0, came)])
    return windows[0].tokens


@pytest.mark.parametrize("rounds", [0, 1, 2, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hit_is_what_a_fresh_start_gives(made, kind, rounds):
    """However far the chains have come when the verdict does, behind every row, and again behind that window."""
    params = KINDS[kind]
    for accepted in (0, 2, 4):
        rollouts = made()
        rollouts.open(opening(params))
        (window,), _ = rollouts.windows([(0, [])])
        assert window.source == "cold" and len(window.tokens) == 4
        came: list[int] = []
        for turn in range(2):
            token = 60 + 7 * accepted + turn
            rollouts.branch([(0, [[9, token, 30]] * (len(window.tokens) + 1))])
            done = sum(rollouts.round() for _ in range(rounds))
            assert done == min(rounds, 4)
            new = [*window.tokens[:accepted], token]
            came += new
            (window,), spent = rollouts.windows([(0, new)])
            assert window.source == "hit" and (spent.fallback > 0) == (rounds == 0)
            assert window.tokens == anew(made(), params, came)


def test_a_miss_begins_anew(made):
    rollouts, params = made(), KINDS["sampled"]
    rollouts.open(opening(params))
    (window,), _ = rollouts.windows([(0, [])])
    rollouts.branch([(0, [[9, 10]] * 5)])
    rollouts.round()
    came = [*window.tokens[:3], 77]
    (after,), spent = rollouts.windows([(0, came)])
    assert after.source == "miss" and spent.rollouts > 0 and spent.fallback > 0
    assert after.tokens == anew(made(), params, came)


def test_what_was_not_in_the_window(made):
    """Another course of things than the drafter's own is read like a prompt."""
    rollouts, params = made(), KINDS["greedy"]
    rollouts.open(opening(params))
    rollouts.windows([(0, [])])
    came = [70, 71, 72, 73, 74, 75, 76, 77]
    (after,), _ = rollouts.windows([(0, came)])
    assert after.source == "miss" and after.tokens == anew(made(), params, came)
    again, _ = rollouts.windows([(0, [])])
    assert again[0].tokens == after.tokens


def test_limits_end_chains(made):
    """No chain goes beyond what may come, an end of text, or what is likely."""
    rollouts = made(length=6)
    rollouts.open(opening(KINDS["greedy"], left=6))
    (window,), _ = rollouts.windows([(0, [])])
    assert len(window.tokens) == 5
    rollouts.branch([(0, [[20], [20], [1], [20], [20], [20]])])
    while rollouts.round():
        pass
    (after,), _ = rollouts.windows([(0, [*window.tokens[:3], 20])])
    assert after.source == "hit" and len(after.tokens) == 1
    sure = made(length=6, confidence=0.999)
    sure.open(opening(KINDS["greedy"]))
    (window,), _ = sure.windows([(0, [])])
    assert len(window.tokens) == 1 and window.estimates[0] < 0.999


def test_several_requests(made):
    """Side by side each has the windows that it has alone, and gives back what it held."""
    params, rollouts = KINDS["sampled"], made()
    prompts = [PROMPT, PROMPT[5:9], PROMPT[::-1]]
    for number, prompt in enumerate(prompts):
        rollouts.open(opening(params, prompt, number=number))
    windows, _ = rollouts.windows([(number, []) for number in range(3)])
    rollouts.branch([(number, [[50, 60]] * 5) for number in range(3)])
    rollouts.round()
    # One comes to its verdict before the others.
    news = [(1, [*windows[1].tokens[:2], 60]), (0, [61]), (2, [*windows[2].tokens, 50])]
    later = {number: rollouts.windows([(number, came)])[0][0] for number, came in news}
    for number, came in news:
        alone = made()
        alone.open(opening(params, prompts[number]))
        assert later[number].tokens == alone.windows([(0, came)])[0][0].tokens
    held = rollouts.held()
    for number in range(3):
        rollouts.close(number)
    assert rollouts.cache.used_bytes == 0 and rollouts.held() < held


def test_hits_grow_with_width(made):
    """Candidates of a narrower tree are those of a wider one, so on one trace it misses no less."""
    params, ranked = KINDS["greedy"], [[(7 * row + 11 * rank) % 140 + 2 for rank in range(8)] for row in range(5)]
    trace = [(row, (7 * row + 11 * rank) % 140 + 2) for row, rank in [(0, 1), (2, 6), (4, 3), (1, 0), (3, 7)]]
    misses = []
    for width in (1, 2, 4, 8):
        rollouts = made(width=width)
        rollouts.open(opening(params))
        (window,), _ = rollouts.windows([(0, [])])
        misses.append(0)
        for row, token in trace:
            rollouts.branch([(0, [each[:width] for each in ranked])])
            rollouts.round()
            (window,), _ = rollouts.windows([(0, [*window.tokens[:row], token])])
            misses[-1] += window.source == "miss"
    assert misses == sorted(misses, reverse=True) and misses == [4, 3, 2, 0]


def test_estimates_are_the_chain_s_probabilities(made):
    """Of a greedy chain: the product of the small model's own, behind the candidate."""
    rollouts = made()
    rollouts.open(opening(KINDS["greedy"]))
    rollouts.windows([(0, [])])
    rollouts.branch([(0, [[50]])])
    while rollouts.round():
        pass
    (window,), _ = rollouts.windows([(0, [50])])
    text, expected = [*PROMPT, 50], 1.0
    for token, estimate in zip(window.tokens, window.estimates, strict=True):
        sequence = rollouts.cache.sequence()
        logits = rollouts.model.forward(Rows.of(sequence, text, 0), [len(text) - 1])
        expected *= float(logits[0].softmax(-1)[token])
        assert int(logits[0].argmax()) == token and estimate == pytest.approx(expected, rel=1e-4)
        sequence.release()
        text.append(token)
    assert torch.isfinite(torch.tensor(window.estimates)).all()
