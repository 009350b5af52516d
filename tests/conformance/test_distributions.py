"""Sampling gives the target's own law: the joint law of three tokens, exactly known, for every rule and drafter.

These see what is grossly wrong in the whole of it; `test_exact_rules` has the rules without chance."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from laws import PROMPT, Law, Propose, by_engine, by_rejection, check_law, draft_model, joint
from proposals import likeliest, sampled

from hasten.engine import ROOT, Draft, Drafter, Drawn
from hasten.engine.sampling.noise import Uniforms
from helpers import Scripted

LAW, OTHER = Law(seed=1), Law(seed=2)
P, Q = LAW.table(), OTHER.table()
TARGET_PURPOSE = 7


NARROW = OTHER.table(top_k=2)
RULES: dict[str, Propose] = {
    "deterministic tree": likeliest(Q, (3, 2)),
    "B: chain": sampled(Q, (1, 1, 1)),
    "C: tree with replacement": sampled(Q, (3, 2)),
    "D: exhausted drafter": sampled(NARROW, (3, 1), replacement=False),
}


@pytest.mark.parametrize("name", RULES)
def test_rules(name):
    groups = [
        np.array([by_rejection(P, RULES[name], 1000 * group + sample) for sample in range(500)]) for group in range(20)
    ]
    check_law(groups, joint(P))


def test_the_test_notices_a_wrong_rule():
    """Likeliest tokens that pass for sampled ones are accepted too often: a common mistake."""

    def lying(context: tuple[int, ...], coins: Uniforms) -> Draft:
        q = Q[context[-2], context[-1]]
        return Draft([int(q.argmax())], [ROOT], {ROOT: Drawn(q)})

    groups = [np.array([by_rejection(P, lying, seed) for seed in range(500)])]
    with pytest.raises(AssertionError):
        check_law(groups, joint(P))


def with_replacement(engine) -> Drafter:
    """A drafter as a user would write it: children i.i.d. from q, by the request's own coins."""
    propose = sampled(Q, (2, 2))
    return Scripted(
        lambda request: propose(tuple(request.tokens), request.sampler.coins(len(request.tokens), TARGET_PURPOSE))
    )


ENGINE_CASES = {
    "plain": ("plain", {}),
    "plain, cool": ("plain", {"temperature": 0.7}),
    "plain, top-k": ("plain", {"top_k": 3}),
    "ngram": ("ngram:minimum=1", {}),
    "ngram, max": ("ngram:minimum=1", {"acceptance": "max", "temperature": 0.7}),
    "copyspec": ("copyspec:gamma=1", {}),
    "suffix, max": ("suffix:tree=true,min_probability=0", {"acceptance": "max", "temperature": 1.2}),
    "token-recycling": ("token-recycling", {}),
    "token-recycling, max": ("token-recycling", {"acceptance": "max", "top_k": 3}),
    "aded": ("aded", {"temperature": 0.8}),
    "auto": ("auto:candidates=suffix/token-recycling/stand:minimum=1", {}),
    "auto, max": ("auto:candidates=token-recycling/stand:minimum=1", {"acceptance": "max"}),
    "specmemo, max": ("specmemo:budget=300kB,drafter=stand:minimum=1", {"acceptance": "max", "temperature": 0.9}),
    "composition, max": ("copyspec+stand:minimum=1", {"acceptance": "max"}),
    "draft model, chain": (draft_model(OTHER, confidence=0.0, length=3), {}),
    "draft model, tree": (draft_model(OTHER, width=3, length=2), {"temperature": 1.3, "top_k": 4}),
    "draft model, chain, max": (draft_model(OTHER, length=3), {"acceptance": "max"}),
    "draft model, tree, max": (draft_model(OTHER, width=3, length=2), {"acceptance": "max", "temperature": 0.8}),
    "draft model, tree, max, top-k": (draft_model(OTHER, width=3, length=2), {"acceptance": "max", "top_k": 2}),
    "with replacement, max": (with_replacement, {"acceptance": "max", "temperature": 0.8}),
}


@pytest.mark.parametrize("name", ENGINE_CASES)
def test_whole_engine(name):
    method, settings = ENGINE_CASES[name]
    groups, _, accepted = by_engine(LAW, method, groups=20, count=100, **settings)
    table = LAW.table(settings.get("temperature", 1.0), settings.get("top_k", 0))
    check_law(groups, joint(table, skipped=1))
    assert accepted > 300 or method == "plain"


@pytest.mark.parametrize(
    "method, acceptance",
    [("plain", "match"), (draft_model(OTHER, width=2, length=3), "max"), (draft_model(OTHER, length=3), "match")],
    ids=["plain", "tree, max", "chain, match"],
)
def test_penalties_inside_a_draft(method, acceptance):
    """A node's distribution is penalised for the tokens of its own branch."""
    penalties = {"presence_penalty": 1.5, "frequency_penalty": 0.5}

    def chance(output: list[int], token: int) -> float:
        counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=5)
        logits = LAW((*PROMPT, *output)) - 1.5 * (counts > 0) - 0.5 * counts
        return float(logits.double().softmax(0)[token])

    exact = np.zeros((5,) * 3)
    for first, *kept in product(range(5), repeat=4):
        output = [first, *kept]
        exact[tuple(kept)] += np.prod([chance(output[:at], output[at]) for at in range(4)])
    groups, _, _ = by_engine(LAW, method, groups=20, count=100, acceptance=acceptance, **penalties)
    check_law(groups, exact)


def test_choices_are_independent():
    """Neighbouring choices, and the same choice of neighbouring seeds, agree no more often than chance has it."""
    groups, _, _ = by_engine(LAW, "plain", groups=20, count=100)
    drawn = np.array(groups)
    chance = float((joint(P, skipped=1) ** 2).sum())
    for pairs in (drawn[:, 1:] == drawn[:, :-1], drawn[1:] == drawn[:-1]):
        agreeing = pairs.all(-1)
        deviation = (chance * (1 - chance) / agreeing.size) ** 0.5
        # Neighbouring pairs share a member, which leaves the expectation alone and widens the deviation a little.
        assert abs(agreeing.mean() - chance) < 6 * deviation


def test_prompt_is_what_the_laws_assume():
    assert len(PROMPT) == 2
    assert joint(P).sum() == pytest.approx(1)
    assert joint(P, 1).sum(axis=(1, 2)) == pytest.approx((P[0, 1][:, None] * P[1]).sum(0).numpy())
    assert torch.allclose(P.sum(-1), torch.ones(5, 5, dtype=torch.float64))
