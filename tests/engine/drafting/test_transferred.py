"""The rule that moves the target's distribution towards the drafter's, by hand and in closed form."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from hasten.engine import Draft, Drawn, Transfer
from hasten.engine.drafting.verification import moved, transferred

P = torch.tensor([0.40, 0.30, 0.20, 0.10], dtype=torch.float64)
Q = torch.tensor([0.10, 0.55, 0.01, 0.34], dtype=torch.float64)
ROUNDS = 64


class Coins:
    """These, one after the other."""

    def __init__(self, *coins: float) -> None:
        self.coins = iter(coins)

    def draw(self) -> float:
        return next(self.coins)


def chain(*tokens: int) -> Draft:
    draft = Draft.chain(tokens)
    draft.drawn = {node: Drawn(Q) for node in range(-1, len(tokens) - 1)}
    return draft


def by_hand(transfer: Transfer) -> np.ndarray:
    """What is judged: softmax(log p + strength * (q - p)), where q is no tail."""
    p, q = P.numpy(), Q.numpy()
    step = np.where(q < transfer.tail * q.max(), 0, transfer.strength * (q - p))
    weights = p * np.exp(step)
    return weights / weights.sum()


@pytest.mark.parametrize("transfer", [Transfer(0, 0.1), Transfer(5, 0.1), Transfer(10, 0), Transfer(20, 0.5)])
def test_tokens_come_out_by_the_closed_form(transfer):
    """min(q, moved), and of what p has above that its share; which is p where nothing is moved."""
    towards = by_hand(transfer)
    torch.testing.assert_close(moved(P, Q, transfer), torch.from_numpy(towards))
    least = np.minimum(Q.numpy(), towards)
    rest = np.maximum(P.numpy() - least, 0)
    expected = least + (1 - least.sum()) * rest / rest.sum()
    assert expected.sum() == pytest.approx(1)
    assert (transfer.strength == 0) == (np.abs(expected - P.numpy()).max() < 1e-12)
    got, points = np.zeros(4), [(number + 0.5) / ROUNDS for number in range(ROUNDS)]
    for token, one, two in product(range(4), points, points[::4]):
        verdict = transferred(chain(token), lambda node: P, Coins(one, two), transfer, greedy=False)
        came = token if verdict.path else verdict.token
        got[came] += float(Q[token]) / ROUNDS / (ROUNDS // 4)
    assert np.abs(got - expected).max() < 0.03


def test_greedily_the_likeliest_of_what_was_moved():
    """p would say 0; moved far enough, it says 1, and where it does not, what it says comes."""
    for strength, tokens, path, token in [
        (0, (0, 0), [0, 1], 0),
        (0, (1, 0), [], 0),
        (10, (1, 1), [0, 1], 0),
        (10, (1, 0), [0], 1),
        (10, (0,), [], 1),
    ]:
        verdict = transferred(chain(*tokens), lambda node: P, Coins(), Transfer(strength, 0.1), greedy=True)
        assert (verdict.path, verdict.token) == (path, token)


def test_a_draft_that_was_cut_keeps_its_rule():
    draft = chain(1, 2, 3)
    draft.transfer = Transfer(4, 0.1)
    assert draft.clamped(2, 9, 4).transfer == draft.subset([0]).transfer == draft.transfer
    verdict = transferred(draft.clamped(0, 9, 4), lambda node: P, Coins(0.5), draft.transfer, greedy=False)
    assert (verdict.path, verdict.token) == ([], 1)
