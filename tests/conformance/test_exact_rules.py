"""The rejection rules, exactly: the target's law is the sum over all drafts and all falls of the coins.

A total variation of 0.005 hides in some thousand samples; here nothing is sampled, and 1e-9 shows.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice, product

import numpy as np
import pytest
import torch
from courses import Coins, courses, law_of_a_step
from laws import Law, Propose
from proposals import (
    draw_children,
    drawn_above_likeliest,
    likeliest,
    likeliest_above_drawn,
    lookup_beside_sample,
    sampled,
    sparse,
)

from hasten import SamplingParams
from hasten.engine import ROOT, Draft, Drawn
from hasten.engine.drafting.verification import match, reject, typical
from hasten.engine.sampling.noise import Uniforms
from hasten.methods.drafters import drawing

SIZE = 3
P, Q = Law(seed=1, size=SIZE).table(), Law(seed=2, size=SIZE).table()
NARROW, SHARP = Law(seed=2, size=SIZE).table(top_k=2), Law(seed=1, size=SIZE).table(temperature=0.3)
CUT = Law(seed=1, size=SIZE).table(top_k=2)
"""A target that never says one of the tokens."""
FOUR = Law(seed=1, size=4).table(), Law(seed=2, size=4).table()

RULES: dict[str, tuple[torch.Tensor, Propose]] = {
    "empty": (P, lambda context, coins: Draft()),
    "A: chain": (P, likeliest(Q, (1, 1))),
    "A: tree": (P, likeliest(Q, (2, 2))),
    "A: everything": (P, likeliest(Q, (SIZE,))),
    "B: chain": (P, sampled(Q, (1, 1, 1))),
    "B: sharper drafter": (P, sampled(SHARP, (1, 1))),
    "B: drafter that knows two tokens": (P, sampled(NARROW, (1, 1))),
    "B: target that says two tokens": (CUT, sampled(Q, (1, 1))),
    "B: drafter that agrees": (P, sampled(P, (1, 1))),
    "B: chain that loses confidence": (P, sampled(Q, (1, 1, 1), stop=0.4)),
    "C: with replacement": (P, sampled(Q, (3, 1))),
    "C: with replacement, two levels": (P, sampled(Q, (2, 2))),
    "C: target that says two tokens": (CUT, sampled(Q, (3,))),
    "C: drafter that agrees": (P, sampled(P, (2, 1))),
    "D: without replacement": (P, sampled(Q, (2, 2), replacement=False)),
    "D: exhausted drafter": (P, sampled(NARROW, (3, 1), replacement=False)),
    "D: target that says two tokens": (CUT, sampled(Q, (2, 1), replacement=False)),
    "D: everything drawn": (P, sampled(Q, (SIZE,), replacement=False)),
    "mixed: sampled above deterministic": (P, drawn_above_likeliest(Q)),
    "mixed: deterministic above sampled": (P, likeliest_above_drawn(P, Q)),
    "mixed: deterministic siblings after sampled ones": (P, lookup_beside_sample(Q)),
    "sparse q": (FOUR[0], sparse(FOUR[1])),
}


def exact(table: torch.Tensor, context: tuple[int, int]) -> np.ndarray:
    p = table.numpy()
    return np.einsum("a,ab,abc->abc", p[context], p[context[1]], p)


@pytest.mark.parametrize("name", RULES)
def test_rejection_is_the_targets_law(name: str):
    table, propose = RULES[name]
    for context in ((0, 1), (2, 2)):
        law = law_of_a_step(table, propose, reject, context)
        assert law == pytest.approx(exact(table, context), abs=1e-9)


def test_a_small_lie_shows():
    """Children drawn a little sharper than said: 0.4 % in total variation, which 20,000 samples do not see."""
    lie = Law(seed=2, size=SIZE).table(temperature=0.985)

    def lying(context: tuple[int, ...], coins: Uniforms) -> Draft:
        draft = Draft()
        draw_children(draft, ROOT, lie[context[-2], context[-1]], 1, coins, True)
        draft.drawn[ROOT] = Drawn(Q[context[-2], context[-1]])
        return draft

    away = np.abs(law_of_a_step(P, lying, reject, (0, 1)) - exact(P, (0, 1))).sum() / 2
    assert 1e-4 < away < 5e-3


def test_typical_acceptance_leaves_the_first_token_alone():
    params = SamplingParams(acceptance="typical", temperature=1.0)
    for propose in (likeliest(Q, (2, 2)), likeliest(P, (SIZE, 1)), sampled(Q, (2, 1))):
        law = law_of_a_step(P, propose, lambda draft, target, coins: typical(draft, target, coins, params), (0, 1))
        assert law.sum((1, 2)) == pytest.approx(P[0, 1].numpy(), abs=1e-9)
        assert np.abs(law - exact(P, (0, 1))).max() > 1e-3


class Given(Uniforms):
    """Coins that were thrown beforehand."""

    def __init__(self, *coins: float) -> None:
        self.left = list(coins)

    def draw(self) -> float:
        return self.left.pop(0)


IDS = [7, 3, 11, 0, 5]


def of_all(q: list[float], coins: Uniforms) -> list[int]:
    children = drawing.sampled(Draft(), ROOT, torch.tensor(q, dtype=torch.float64), None, coins)
    return [token for token, _ in islice(children, 2)]


def of_some(q: list[float], coins: Uniforms) -> list[int]:
    children = drawing.sampled(Draft(), ROOT, torch.tensor(q, dtype=torch.float64), torch.tensor(IDS), coins)
    return [IDS.index(token) for token, _ in islice(children, 2)]


@pytest.mark.parametrize("drawn", [of_all, of_some], ids=["all tokens", "some tokens"])
def test_drafters_draw_as_they_say(drawn: Callable[[list[float], Uniforms], list[int]]):
    """Two children without replacement, by each coin's whole range: 5,000 points of it, so to 0.001."""
    q = [0.15, 0.0, 0.4, 0.25, 0.2]
    grid = [(point + 0.5) / 5000 for point in range(5000)]
    first = [drawn(q, Given(coin, 0.5))[0] for coin in grid]
    for token, chance in enumerate(q):
        assert first.count(token) / 5000 == pytest.approx(chance, abs=1e-3)
        if chance:
            coin = grid[first.index(token)]
            second = [drawn(q, Given(coin, other)) for other in grid]
            assert {pair[0] for pair in second} == {token}
            for other, likely in enumerate(q):
                left = 0.0 if other == token else likely / (1 - chance)
                assert sum(pair[1] == other for pair in second) / 5000 == pytest.approx(left, abs=1e-3)


def test_matching_is_a_walk_along_the_targets_own_choices():
    """Whatever is drafted, what comes out is a beginning of the text that the choices spell."""
    table = torch.randint(SIZE, (SIZE,) * 2, generator=torch.Generator().manual_seed(0))
    for widths in ((1, 1, 1), (2, 2), (SIZE, 1)):
        for context in product(range(SIZE), repeat=2):
            draft = likeliest(Q, widths)(context, Uniforms(0))
            paths = [
                (*context, *(draft.tokens[step] for step in draft.path(node))) for node in (ROOT, *range(len(draft)))
            ]
            verdict = match(draft, [int(table[path[-2], path[-1]]) for path in paths])
            came = [*(draft.tokens[node] for node in verdict.path), verdict.token]
            text = list(context)
            for _ in came:
                text.append(int(table[text[-2], text[-1]]))
            assert came == text[2:]
            # It went as far as the draft had it.
            node = verdict.path[-1] if verdict.path else ROOT
            assert verdict.token not in [draft.tokens[child] for child in draft.children().get(node, ())]


def test_courses_are_all_there_are():
    """Two coins against a half and a third: four courses, whose probabilities are known."""

    def toss(coins: Coins) -> tuple[bool, bool]:
        return coins.draw() < 0.5, coins.draw() * 3 < 1

    found = {result: chance for chance, result in courses(toss)}
    assert found == pytest.approx(
        {(True, True): 1 / 6, (True, False): 1 / 3, (False, True): 1 / 6, (False, False): 1 / 3}
    )
    assert sum(chance for chance, _ in courses(toss)) == pytest.approx(1)
