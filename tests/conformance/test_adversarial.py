"""Drafters that are wrong, malformed or hostile: the output stays plain decoding's, and the figures add up."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from cases import KINDS, PROMPTS, params

from hasten import SamplingParams
from hasten.engine import ROOT, Draft, Drawn
from helpers import END, VOCABULARY, Scripted, check_statistics, same

NUMBERS = range(0, len(PROMPTS), 6)
KIND_OF = {number: list(KINDS)[index % len(KINDS)] for index, number in enumerate(NUMBERS)}

Make = Callable[[random.Random, list[int]], Draft]
"""From private randomness and what plain decoding goes on with to a draft."""


def tree(rng: random.Random, right: list[int], nodes: int, reach: int) -> Draft:
    """A random tree, each node below one of the `reach` latest; right tokens turn up at all depths."""
    draft = Draft()
    for node in range(nodes):
        parent = rng.randrange(max(ROOT, node - reach), node)
        depth = 0 if parent == ROOT else draft.depths()[parent]
        good = right[depth] if depth < len(right) and rng.random() < 0.6 else rng.randrange(VOCABULARY)
        draft.tokens.append(good)
        draft.parents.append(parent)
    return draft


def twins(rng: random.Random, right: list[int]) -> Draft:
    """Every node twice, only the second with children."""
    draft, parent = Draft(), ROOT
    for token in right[:5]:
        draft.tokens += [token, token]
        draft.parents += [parent, parent]
        parent = len(draft) - 1
    return draft


ADVERSARIES: dict[str, Make] = {
    "random": lambda rng, right: Draft.chain(rng.choices(range(VOCABULARY), k=6)),
    "always wrong": lambda rng, right: Draft.chain([(token + 1) % VOCABULARY for token in right[:6]]),
    "wrong in the end": lambda rng, right: Draft.chain([*right[:3], (right[3] + 1) % VOCABULARY, *right[4:6]]),
    "end of text": lambda rng, right: Draft.chain([END] * 4),
    "end of text after the right tokens": lambda rng, right: Draft.chain([*right[:2], END, *right[2:5]]),
    "over-long": lambda rng, right: Draft.chain([*right[:4], *rng.choices(range(VOCABULARY), k=500)]),
    "over-wide": lambda rng, right: Draft(
        [*rng.choices(range(VOCABULARY), k=40), *right[:1], *range(450)], [ROOT] * 491
    ),
    "ids out of range": lambda rng, right: Draft.chain([*right[:2], VOCABULARY, 10**12, *right[2:4]]),
    "negative ids": lambda rng, right: Draft([-1, *right[:2], -100, *right[2:4]], [ROOT, ROOT, 1, 1, 2, 4]),
    "bad parents": lambda rng, right: Draft(right[:6], [ROOT, 0, 2, -7, 99, 1]),
    "parents in a ring": lambda rng, right: Draft(right[:4], [1, 0, 3, 2]),
    "too few parents": lambda rng, right: Draft(right[:5], [ROOT, 0]),
    "too many parents": lambda rng, right: Draft(right[:3], [ROOT, 0, 1, 2, 3, 4]),
    "duplicate siblings": twins,
    "wide tree": lambda rng, right: tree(rng, right, 50, 50),
    "deep tree": lambda rng, right: tree(rng, right, 60, 3),
    "now and then": lambda rng, right: tree(rng, right, 8, 8) if rng.random() < 0.4 else Draft(),
}


def adversary(make: Make, answers: dict[tuple[int, ...], list[int]]) -> Scripted:
    def script(request):
        right = [*answers[tuple(request.tokens[: request.prompt_length])][len(request.output) :], *range(9)]
        return make(random.Random(f"{request.tokens}"), right)

    return Scripted(script)


@pytest.fixture(scope="module")
def answers(plain):
    return {tuple(PROMPTS[number]): plain(number, KIND_OF[number]).token_ids for number in NUMBERS}


@pytest.mark.parametrize("name", ADVERSARIES)
def test_output_is_plain_decodings(llm, plain, answers, name):
    drafter = adversary(ADVERSARIES[name], answers)
    generations = llm.generate(
        [PROMPTS[number] for number in NUMBERS], [params(number, KIND_OF[number]) for number in NUMBERS], drafter
    )
    for number, generation in zip(NUMBERS, generations, strict=True):
        same(generation.choices[0], plain(number, KIND_OF[number]))
    assert sorted(drafter.began) == sorted(drafter.ended)


def test_good_parts_of_bad_drafts_are_used(llm, plain, answers):
    for name in (
        "wrong in the end",
        "over-long",
        "over-wide",
        "ids out of range",
        "negative ids",
        "bad parents",
        "too few parents",
        "too many parents",
        "duplicate siblings",
        "wide tree",
        "deep tree",
    ):
        drafter = adversary(ADVERSARIES[name], answers)
        got = llm.generate([PROMPTS[6]], params(6, KIND_OF[6]), drafter)[0].choices[0]
        same(got, plain(6, KIND_OF[6]))
        assert got.statistics.accepted > 0, name


@pytest.mark.parametrize("acceptance", ["max", "typical"])
@pytest.mark.parametrize("name", ADVERSARIES)
def test_other_rules_survive(llm, answers, name, acceptance):
    """The text is another one there; it is the same each time, in any company."""

    def drafted(number: int) -> SamplingParams:
        return params(number, "everything", acceptance=acceptance, max_tokens=10)

    drafter = adversary(ADVERSARIES[name], answers)
    chosen = list(NUMBERS)[:6]
    together = llm.generate([PROMPTS[number] for number in chosen], [drafted(number) for number in chosen], drafter)
    for generation in together:
        check_statistics(generation.choices[0])
        assert all(0 <= token < VOCABULARY for token in generation.token_ids)
    alone = llm.generate([PROMPTS[chosen[2]]], drafted(chosen[2]), drafter)[0]
    same(alone.choices[0], together[2].choices[0])


def test_sampled_children_that_were_cut(llm, answers):
    """`drawn` names nodes that clamping removed, and nodes without children."""

    def script(request):
        flat = torch.full((VOCABULARY,), 1 / VOCABULARY, dtype=torch.float64)
        draft = Draft.chain([5, 6, VOCABULARY + 3, 8])
        draft.drawn = {node: Drawn(flat) for node in (ROOT, 0, 1, 2, 3)}
        return draft

    asked = SamplingParams(max_tokens=12, temperature=1, seed=3, acceptance="max")
    got = llm.generate(PROMPTS[:8], asked, Scripted(script))
    for generation in got:
        check_statistics(generation.choices[0])
