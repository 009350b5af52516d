"""Typical acceptance (Medusa, lossy): p(x) > min(epsilon, delta * exp(-entropy)), in cases worked out by hand."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest
import torch
from laws import Law, by_engine
from scipy.stats import chisquare

from hasten import SamplingParams
from hasten.engine import ROOT, Draft
from hasten.engine.drafting.verification import typical
from hasten.engine.sampling.noise import Uniforms
from helpers import Scripted

SURE = [1.0, 0.0, 0.0, 0.0]
FLAT = [0.25, 0.25, 0.25, 0.25]
PEAK = [0.94, 0.02, 0.02, 0.02]
HALF = [0.5, 0.5, 0.0, 0.0]


def accepted(draft: Draft, rows: dict[int, list[float]], **settings) -> list[int]:
    """The path kept, the root being sure of token 0 unless `rows` says otherwise."""
    tables = {node: torch.tensor(row, dtype=torch.float64) for node, row in {ROOT: SURE, **rows}.items()}
    params = SamplingParams(temperature=1, acceptance="typical", **settings)
    return typical(draft, lambda node: tables[node], Uniforms(3), params).path


CHAIN = Draft.chain([0, 1])
"""The target's own token, then token 1 on probation, judged by row 0."""


@pytest.mark.parametrize(
    "row, settings, kept",
    [
        # Entropy log 4: the threshold is min(0.09, 0.3 / 4) = 0.075, below 0.25.
        (FLAT, {}, True),
        # min(0.3, 1.2 / 4) = 0.3, above 0.25.
        (FLAT, {"typical_epsilon": 0.3, "typical_delta": 1.2}, False),
        # min(0.25, ..) = 0.25: "more than" the threshold, not "at least".
        (FLAT, {"typical_epsilon": 0.25, "typical_delta": 5.0}, False),
        (FLAT, {"typical_epsilon": 0.2499, "typical_delta": 5.0}, True),
        # A confident row has little entropy: epsilon decides, and 0.02 is not typical.
        (PEAK, {}, False),
        (PEAK, {"typical_epsilon": 0.019}, True),
        # Entropy log 2: min(0.9, delta / 2) against 0.5.
        (HALF, {"typical_epsilon": 0.9, "typical_delta": 0.99}, True),
        (HALF, {"typical_epsilon": 0.9, "typical_delta": 1.01}, False),
        # Probability zero is never typical, whatever the thresholds.
        (SURE, {"typical_epsilon": 1e-9, "typical_delta": 1e-9}, False),
    ],
)
def test_threshold(row, settings, kept):
    assert accepted(CHAIN, {0: row, 1: FLAT}, **settings) == ([0, 1] if kept else [0])


def test_entropy_threshold_of_an_uneven_row():
    row = [0.6, 0.3, 0.1, 0.0]
    entropy = -sum(p * log(p) for p in row if p)
    border = 0.1 * exp(entropy)
    draft = Draft.chain([0, 2])
    for delta, kept in ((border * 0.999, True), (border * 1.001, False)):
        settings = {"typical_epsilon": 0.9, "typical_delta": delta}
        assert accepted(draft, {0: row, 1: FLAT}, **settings) == ([0, 1] if kept else [0])


def test_first_token_is_the_targets():
    """However typical another is."""
    assert accepted(Draft.chain([1, 0]), {0: FLAT, 1: FLAT}) == []
    assert accepted(Draft([1, 0, 2], [ROOT, ROOT, 1]), {0: FLAT, 1: FLAT, 2: FLAT}) == [1, 2]
    assert accepted(Draft(), {}) == []


def test_longest_path_then_likeliest():
    short_and_likely = Draft([0, 0, 1, 2], [ROOT, 0, 0, 2])
    assert accepted(short_and_likely, {0: [0.6, 0.4, 0, 0], 2: FLAT, 1: FLAT, 3: FLAT}) == [0, 2, 3]
    equally_long = Draft([0, 0, 1], [ROOT, 0, 0])
    assert accepted(equally_long, {0: [0.4, 0.6, 0, 0], 1: FLAT, 2: FLAT}) == [0, 2]
    # The sum over the path decides, not the last token: 0.3 * 0.9 < 0.7 * 0.5.
    sums = Draft([0, 0, 1, 2, 3], [ROOT, 0, 0, 1, 2])
    rows = {0: [0.3, 0.7, 0, 0], 1: [0, 0, 0.9, 0.1], 2: [0, 0, 0.5, 0.5], 3: FLAT, 4: FLAT}
    assert accepted(sums, rows) == [0, 2, 4]


def test_nothing_below_a_rejected_token():
    assert accepted(Draft.chain([0, 1, 0, 0]), {0: PEAK, 1: SURE, 2: SURE, 3: SURE}) == [0]


def test_law_of_the_first_token():
    """Every step's first token is a fair draw, though a draft is there to tempt."""
    p = Law(4).table()[0, 1]
    draft = Draft([int(p.argmax()), int(p.argmin())], [ROOT, ROOT])
    params = SamplingParams(temperature=1, acceptance="typical")
    counts = np.zeros(len(p))
    for seed in range(4000):
        verdict = typical(draft, lambda node: p, Uniforms(seed), params)
        counts[draft.tokens[verdict.path[0]] if verdict.path else verdict.token] += 1
    assert chisquare(counts, p.numpy() * counts.sum()).pvalue > 0.001


def test_lossy_in_the_engine():
    """It accepts more than the lossless rules, which is the point and the price."""

    def likeliest(engine):
        law = engine.model.law

        def script(request):
            history, tokens = tuple(request.tokens), []
            for _ in range(3):
                tokens.append(int(law(history).argmax()))
                history = (*history, tokens[-1])
            return Draft.chain(tokens)

        return Scripted(script)

    accepted = {
        rule: by_engine(Law(1), likeliest, groups=1, count=300, acceptance=rule)[2] for rule in ("max", "typical")
    }
    assert accepted["typical"] > accepted["max"] * 1.1
