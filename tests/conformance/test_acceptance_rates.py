"""Acceptance is as high as the theory says: too low would still be lossless, and hide a bug."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from laws import Law, by_engine, draft_model
from torch import Tensor

from hasten import SamplingParams
from hasten.engine import ROOT, Draft, Drawn, Engine, Limits
from hasten.engine.drafting.verification import match, reject
from hasten.engine.sampling.noise import Uniforms, gumbel
from hasten.engine.sampling.sampler import draw
from hasten.model import OracleModel
from helpers import Scripted

PAIRS = [(Law(seed).table()[0, 1], Law(seed + 50).table()[0, 1]) for seed in range(4)]
SAMPLES = 2500


def accepted(p: Tensor, q: Tensor, count: int, replacement: bool) -> float:
    """How often one of `count` children drawn from q is accepted."""
    hits = 0
    for seed in range(SAMPLES):
        coins, rest, tokens = Uniforms(seed, 1), q.clone(), []
        for _ in range(count):
            tokens.append(draw(rest, coins.draw()))
            if not replacement:
                rest[tokens[-1]] = 0
        draft = Draft(tokens, [ROOT] * count, {ROOT: Drawn(q, replacement=replacement)})
        hits += len(reject(draft, lambda node: p, Uniforms(seed, 2)).path)
    return hits / SAMPLES


def deviation(rate: float) -> float:
    return (rate * (1 - rate) / SAMPLES) ** 0.5


@pytest.mark.parametrize("p, q", PAIRS)
def test_one_sampled_child(p, q):
    """Rule B accepts with probability sum min(p, q)."""
    exact = float(torch.minimum(p, q).sum())
    assert abs(accepted(p, q, 1, True) - exact) < 4 * deviation(exact)
    assert accepted(p, p, 1, True) == 1


@pytest.mark.parametrize("p, q", PAIRS)
def test_more_children_help(p, q):
    """Rules C and D accept more than B, and D at least as much as C: it never tries a token twice."""
    one = float(torch.minimum(p, q).sum())
    again, fresh = accepted(p, q, 3, True), accepted(p, q, 3, False)
    assert again > one + 4 * deviation(one)
    assert fresh > again - 4 * deviation(again)
    assert accepted(p, q, 5, False) == 1


@pytest.mark.parametrize("p, q", PAIRS)
def test_deterministic_children(p, q):
    """No rule accepts a fixed set of children with more, and this one with no less, than its probability."""
    tokens = q.topk(2).indices.tolist()
    hits = [len(reject(Draft(tokens, [ROOT] * 2), lambda node: p, Uniforms(seed)).path) for seed in range(SAMPLES)]
    exact = float(p[tokens].sum())
    assert abs(np.mean(hits) - exact) < 4 * deviation(exact)


@pytest.mark.parametrize("p, q", PAIRS)
def test_shared_noise(p, q):
    """Two distributions with the same Gumbel noise choose the same token as often as a closed form says."""
    noise = gumbel(range(SAMPLES), torch.arange(len(p)))
    hits = [
        len(match(Draft.chain([theirs]), [ours, 0]).path)
        for ours, theirs in zip(
            (p.log() + noise).argmax(-1).tolist(), (q.log() + noise).argmax(-1).tolist(), strict=True
        )
    ]
    larger = torch.maximum(p[None] / p[:, None], q[None] / q[:, None])
    exact = float((1 / larger.sum(1)).sum())
    assert abs(np.mean(hits) - exact) < 4 * deviation(exact)


@pytest.mark.parametrize("acceptance", ["match", "max"])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_a_drafter_that_is_the_target_is_always_accepted(acceptance, temperature):
    law = Law(3)
    engine = Engine(OracleModel(law, law.size))
    drafter = draft_model(law, length=4, confidence=0.0)(engine)
    params = SamplingParams(max_tokens=51, n=4, seed=1, temperature=temperature, acceptance=acceptance)
    requests = engine.add((0, 1), params, drafter)
    for _ in engine.run():
        pass
    for request in requests:
        assert request.statistics.accepted == request.statistics.proposed == 40
        assert request.statistics.steps == 11


@pytest.mark.parametrize("alpha, gamma", [(0.5, 2), (0.8, 4), (0.9, 7)])
def test_tokens_per_step_of_a_coin(alpha, gamma):
    """Leviathan et al., equation 1: (1 - alpha^(gamma + 1)) / (1 - alpha) tokens per step."""
    size = 8
    successor = torch.full((size, size), -30.0)
    successor[torch.arange(size), (torch.arange(size) * 3 + 1) % size] = 30.0
    coin = random.Random(1)

    def script(request):
        tokens, last = [], request.tokens[-1]
        for _ in range(gamma):
            right = (last * 3 + 1) % size
            tokens.append(right if coin.random() < alpha else (right + 1) % size)
            last = right
        return Draft.chain(tokens)

    engine = Engine(OracleModel(lambda history: successor[history[-1]], size), limits=Limits(sequences=50))
    drafter = Scripted(script)
    for start in range(50):
        engine.add([start % size], SamplingParams(max_tokens=80), drafter)
    for _ in engine.run():
        pass
    # Steps at the end of a request draft less; their drafts are shorter.
    whole = [len(seen.tokens) for steps in drafter.seen.values() for seen in steps if len(seen.draft) == gamma]
    assert len(whole) > 500
    assert np.mean(whole) == pytest.approx((1 - alpha ** (gamma + 1)) / (1 - alpha), rel=0.05)


def test_max_is_accepted_more_often_than_match():
    """That is what it is for."""

    other = draft_model(Law(2), confidence=0.0, length=2)
    counts = {
        acceptance: by_engine(Law(1), other, groups=1, count=1500, acceptance=acceptance)[2]
        for acceptance in ("match", "max")
    }
    assert counts["max"] > counts["match"] * 1.05
