"""RAPID's transfer: the law of what comes out, in closed form, and its greedy rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from laws import Law
from scipy.stats import chisquare
from torch import Tensor

from hasten.engine import ROOT, Draft, Drawn
from hasten.engine.drafting.verification import moved, transfer
from hasten.engine.sampling.noise import Uniforms
from hasten.engine.sampling.sampler import draw

SAMPLES = 8000
PAIRS = [(Law(seed).table()[0, 1], Law(seed + 50).table()[0, 1]) for seed in range(3)]


def emitted(p: Tensor, q: Tensor, eta: float) -> Tensor:
    """min(q, p') + (1 - mass) * norm(max(p - min(q, p'), 0)), with p' written out by itself."""
    shift = [eta * float(b - a) if float(b) >= 0.1 * float(q.max()) else 0.0 for a, b in zip(p, q, strict=True)]
    raised = p * torch.tensor(shift, dtype=torch.float64).exp()
    kept = torch.minimum(q, raised / raised.sum())
    rest = (p - kept).clamp(min=0)
    return kept + (1 - kept.sum()) * (rest / rest.sum() if float(rest.sum()) else p)


def drafted(token: int, q: Tensor, eta: float) -> Draft:
    return Draft([token], [ROOT], {ROOT: Drawn(q, replacement=False)}, transfer=eta)


def first(p: Tensor, q: Tensor, eta: float, seed: int) -> int:
    """The first token that comes of a draft of one."""
    draft = drafted(draw(q, Uniforms(seed, 1).draw()), q, eta)
    verdict = transfer(draft, lambda node: p, Uniforms(seed, 2), greedy=False)
    return draft.tokens[0] if verdict.path else verdict.token


@pytest.mark.parametrize("p, q", PAIRS)
@pytest.mark.parametrize("eta", [1e-9, 2.0, 10.0])
def test_law(p, q, eta):
    counts = np.bincount([first(p, q, eta, seed) for seed in range(SAMPLES)], minlength=len(p))
    law = emitted(p, q, eta)
    assert float(law.sum()) == pytest.approx(1)
    assert chisquare(counts, law.numpy() * counts.sum()).pvalue > 1e-3
    distance = 0.5 * float((law - p).abs().sum())
    assert distance < 1e-6 if eta < 1 else distance > 0.02


@pytest.mark.parametrize("p, q", PAIRS)
def test_a_little_of_it_accepts_more(p, q):
    def rate(eta: float) -> float:
        return float(torch.minimum(q, moved(p, q, eta)).sum())

    assert rate(1.0) > rate(0.0) == pytest.approx(float(torch.minimum(p, q).sum()))


def test_what_the_drafter_hardly_believes_stays():
    p, q = (torch.tensor(values, dtype=torch.float64) for values in ([0.2, 0.5, 0.3], [0.9, 0.05, 0.05]))
    after = moved(p, q, 3.0)
    assert float(after[1] / after[2]) == pytest.approx(0.5 / 0.3)
    assert float(after[0]) > 0.2


def test_greedily_the_likeliest_after_the_move():
    p, q = (torch.tensor(values, dtype=torch.float64) for values in ([0.4, 0.6], [0.9, 0.1]))
    assert int(moved(p, q, 2.0).argmax()) == 0
    chosen = transfer(drafted(0, q, 2.0), lambda node: p, Uniforms(0), greedy=True)
    # Behind the last node nobody has drafted: the target speaks for itself.
    assert (chosen.path, chosen.token) == ([0], 1)
    other = transfer(drafted(1, q, 2.0), lambda node: p, Uniforms(0), greedy=True)
    assert (other.path, other.token) == ([], 0)


def test_what_is_forbidden_stays_so():
    p, q = (torch.tensor(values, dtype=torch.float64) for values in ([0.0, 1.0], [1.0, 0.0]))
    assert moved(p, q, 50.0).tolist() == [0.0, 1.0]
    assert {first(p, q, 50.0, seed) for seed in range(20)} == {1}


def test_drafts_that_are_cut_keep_it():
    draft = Draft([1, 2, 3], [-1, 0, 1], transfer=3.0)
    assert draft.subset([0, 1]).transfer == draft.clamped(2, 2, 10).transfer == 3.0
