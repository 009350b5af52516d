"""Sampling gives the target's own law: the joint law of three tokens, exactly known, for every rule and drafter."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from laws import PROMPT, Law, Propose, by_engine, by_rejection, check_law, draft_model, joint
from torch import Tensor

from hasten.engine import ROOT, Draft, Drafter, Drawn
from hasten.engine.noise import Uniforms
from hasten.engine.sampling import draw
from helpers import Scripted, add

LAW, OTHER = Law(seed=1), Law(seed=2)
P, Q = LAW.table(), OTHER.table()
TARGET_PURPOSE = 7


def draw_children(draft: Draft, node: int, q: Tensor, count: int, coins: Uniforms, replacement: bool) -> list[int]:
    """Sample children of a node, say so in the draft, and return their numbers."""
    draft.drawn[node] = Drawn(q, replacement=replacement)
    rest, nodes = q.clone(), []
    for _ in range(count):
        if float(rest.sum()) <= 0:
            break
        token = draw(rest, coins.draw())
        nodes.append(add(draft, token, node))
        if not replacement:
            rest[token] = 0
    return nodes


def sampled(table: Tensor, widths: tuple[int, ...], replacement: bool = True, stop: float = 0.0) -> Propose:
    """A tree of `widths[level]` children per node drawn from `table`; branches end behind tokens below `stop`."""

    def propose(context: tuple[int, ...], coins: Uniforms) -> Draft:
        draft = Draft()
        level = [(ROOT, context)]
        for width in widths:
            below = []
            for node, above in level:
                q = table[above[-2], above[-1]]
                for child in draw_children(draft, node, q, width, coins, replacement):
                    token = draft.tokens[child]
                    if q[token] >= stop:
                        below.append((child, (*above, token)))
            level = below
        return draft

    return propose


def likeliest(table: Tensor, widths: tuple[int, ...]) -> Propose:
    """A deterministic tree of the likeliest tokens."""

    def propose(context: tuple[int, ...], coins: Uniforms) -> Draft:
        draft = Draft()
        level = [(ROOT, context)]
        for width in widths:
            level = [
                (add(draft, token, node), (*above, token))
                for node, above in level
                for token in table[above[-2], above[-1]].topk(width).indices.tolist()
            ]
        return draft

    return propose


def drawn_above_likeliest(context: tuple[int, ...], coins: Uniforms) -> Draft:
    draft = Draft()
    for child in draw_children(draft, ROOT, Q[context[-2], context[-1]], 2, coins, False):
        for token in Q[context[-1], draft.tokens[child]].topk(2).indices.tolist():
            add(draft, token, child)
    return draft


def likeliest_above_drawn(context: tuple[int, ...], coins: Uniforms) -> Draft:
    draft = Draft()
    for token in P[context[-2], context[-1]].topk(2).indices.tolist():
        child = add(draft, token, ROOT)
        draw_children(draft, child, Q[context[-1], token], 2, coins, True)
    return draft


def lookup_beside_sample(context: tuple[int, ...], coins: Uniforms) -> Draft:
    """Two sampled children, and deterministic siblings after them: one of them was perhaps drawn, too."""
    draft = Draft()
    q = Q[context[-2], context[-1]]
    draw_children(draft, ROOT, q, 2, coins, False)
    draft.drawn[ROOT] = Drawn(q, replacement=False, count=2)
    for token in (3, 3, context[-1]):
        draw_children(draft, add(draft, token, ROOT), Q[context[-1], token], 1, coins, True)
    return draft


def sparse(context: tuple[int, ...], coins: Uniforms) -> Draft:
    """Drawn from three tokens only, with their ids."""
    draft = Draft()
    values, ids = Q[context[-2], context[-1]].topk(3)
    q = values / values.sum()
    for _ in range(2):
        add(draft, int(ids[draw(q, coins.draw())]), ROOT)
    draft.drawn[ROOT] = Drawn(q, ids)
    return draft


NARROW = OTHER.table(top_k=2)
RULES: dict[str, Propose] = {
    "empty": lambda context, coins: Draft(),
    "deterministic chain": likeliest(Q, (1, 1)),
    "deterministic tree": likeliest(Q, (3, 2)),
    "deterministic tree of everything": likeliest(Q, (5,)),
    "B: chain": sampled(Q, (1, 1, 1)),
    "B: draft temperature": sampled(LAW.table(temperature=0.4), (1, 1)),
    "B: drafter that knows two tokens": sampled(NARROW, (1, 1)),
    "B: drafter that agrees": sampled(P, (1, 1)),
    "B: chain that loses confidence": sampled(Q, (1, 1, 1), stop=0.4),
    "C: tree with replacement": sampled(Q, (3, 2)),
    "C: drafter that agrees": sampled(P, (2, 2)),
    "D: tree without replacement": sampled(Q, (3, 2), replacement=False),
    "D: exhausted drafter": sampled(NARROW, (3, 1), replacement=False),
    "D: everything drawn": sampled(Q, (5,), replacement=False),
    "mixed: sampled above deterministic": drawn_above_likeliest,
    "mixed: deterministic above sampled": likeliest_above_drawn,
    "mixed: deterministic siblings after sampled ones": lookup_beside_sample,
    "sparse q": sparse,
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
