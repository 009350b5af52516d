"""Rows choose as they are computed with tensors, whether in C++ or in NumPy, and walks look only where they come."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hasten import SamplingParams
from hasten.engine import Draft
from hasten.engine.drafting import verification
from hasten.engine.sampling import walk
from hasten.engine.sampling.native.library import library
from hasten.engine.sampling.sampler import Sampler

SIZES = [5, 7, 255, 256, 257, 1000, 4096, 50_001, 150_000]
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "coldest": {"temperature": 1e-6},
    "cold": {"temperature": 0.1},
    "warm": {"temperature": 0.8},
    "hot": {"temperature": 100.0},
    "top-k": {"temperature": 0.8, "top_k": 3},
    "many": {"temperature": 1.0, "top_k": 200},
    "top-p": {"temperature": 0.9, "top_p": 0.7},
    "next to nothing": {"temperature": 1.0, "top_p": 1e-6},
    "nearly all": {"temperature": 1.0, "top_p": 0.999},
    "min-p": {"temperature": 1.0, "min_p": 0.1},
    "only the likeliest": {"temperature": 1.0, "min_p": 1.0},
    "all three": {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
}
OTHERS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "bias": {"logit_bias": {1: 2.5, 3: -torch.inf, 4: -1.0}},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.3, "frequency_penalty": -0.2},
    "all": {"logit_bias": {0: 1.5, 2: -torch.inf}, "repetition_penalty": 0.8, "frequency_penalty": 0.4},
}


def kinds(size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Logits of some kinds, [2, size]."""
    logits = torch.randn(2, size, generator=generator)
    peaked = logits.clone()
    peaked[:, size // 2] = 20.0
    barred = logits.masked_fill(torch.rand(2, size, generator=generator) < 0.6, -torch.inf)
    barred[:, 1] = 0.5
    return {"flat": 0.1 * logits, "usual": 4 * logits, "peaked": peaked, "barred": barred, "far": 30 * logits - 500}


def by_tensors(own: Sampler, logits: Tensor, positions: list[int], paths: list[list[int]]) -> list[int]:
    """What rows choose, from the distribution that rejection rules and drafters have."""
    if own.params.greedy:
        return own.adjusted(logits, paths).argmax(-1).tolist()
    distribution = own.distribution(logits, paths)
    best = own.perturbed(distribution, positions).argmax(-1)
    return best.tolist() if distribution.ids is None else distribution.ids.gather(1, best[:, None]).flatten().tolist()


@pytest.fixture(params=["native", "plain"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library and without."""
    if request.param == "plain":
        monkeypatch.setattr(walk, "library", lambda: None)
    elif library() is None:
        pytest.skip("not built")


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_tokens_are_those_of_the_distribution(settings: dict[str, Any], size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    for others in OTHERS.values():
        for seed, logits in enumerate(kinds(size, generator).values()):
            own = Sampler(SamplingParams(seed=seed, **settings, **others), 1, [0, 4, 4], size)
            own.committed([1, 1, 2])
            positions, paths = [6, 9], [[], [4, 1, 4]]
            assert own.choose(logits, positions, paths) == by_tensors(own, logits, positions, paths)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_of_equal_tokens_the_first_are_kept(settings: dict[str, Any]) -> None:
    """Ties at the border of top-k: PyTorch keeps any of them."""
    logits = torch.randn(1, 2000, generator=torch.Generator().manual_seed(1)).round()
    fewer = logits.clone()
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[0]
    fewer[0, order[settings.get("top_k", 2000) :]] = -torch.inf
    for seed in range(20):
        own = Sampler(SamplingParams(seed=seed, **settings), 0, [1], 2000)
        assert own.choose(logits, [3], [[]]) == own.choose(fewer, [3], [[]])


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_nothing_possible_is_no_error(settings: dict[str, Any]) -> None:
    own = Sampler(SamplingParams(seed=1, **settings), 0, [1], 300)
    assert own.choose(torch.full((1, 300), -torch.inf), [3], [[]]) == [0]
    for value in (torch.nan, torch.inf):
        assert 0 <= own.choose(torch.full((1, 300), value), [3], [[]])[0] < 300


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("settings", [SETTINGS["greedy"], SETTINGS["warm"], SETTINGS["top-p"]], ids=str)
@pytest.mark.parametrize("others", OTHERS.values(), ids=OTHERS)
def test_a_walk_is_the_match_of_all_rows(others: dict[str, Any], settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    size, nodes, lengths = 6, 12, set()
    for seed in range(60):
        own = Sampler(SamplingParams(seed=seed, **settings, **others), 0, [1, 5], size)
        parents = [int(torch.randint(-1, node, (), generator=generator)) if node else -1 for node in range(nodes)]
        draft = Draft(torch.randint(size, (nodes,), generator=generator).tolist(), parents)
        logits = torch.randn(nodes + 1, size, generator=generator)
        paths = [[draft.tokens[each] for each in draft.path(node)] for node in range(-1, nodes)]
        chosen = by_tensors(own, logits, [20 + len(path) for path in paths], paths)
        verdict = verification.match(draft, chosen)
        (outcome,) = walk.descend([own.walk(logits, 20, draft)])
        assert (outcome.path, outcome.token) == (verdict.path, verdict.token)
        lengths.add(len(outcome.path))
    assert {0, 1, 2} <= lengths


def test_walks_together_are_walks_alone() -> None:
    walks = []
    for seed, (settings, others) in enumerate((a, b) for a in SETTINGS.values() for b in OTHERS.values()):
        own = Sampler(SamplingParams(seed=seed, **settings, **others), seed % 3, [1, 5], 700)
        logits = torch.randn(3, 700, generator=torch.Generator().manual_seed(seed))
        walks.append(own.walk(logits, seed, Draft.chain([int(logits[0].argmax()), 7])))
    together = walk.descend(walks)
    assert together == [walk.descend([each])[0] for each in walks]
    assert {len(outcome.path) for outcome in together} >= {0, 1}
    assert walk.descend([]) == []


@pytest.mark.usefixtures("either")
def test_rows_that_are_not_reached_are_not_looked_at() -> None:
    own = Sampler(SamplingParams(seed=1, temperature=0.5), 0, [1], 300)
    logits = torch.full((4, 300), torch.nan)
    logits[0], logits[0, 7] = -3.0, 30.0
    logits[2], logits[2, 9] = -3.0, 30.0
    assert walk.descend([own.walk(logits, 5, Draft([6, 7, 8], [-1, -1, 1]))]) == [([1], 9)]


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("spread", [slice(None), slice(None, None, 2)])
def test_logits_may_lie_anyhow(spread: slice) -> None:
    own = Sampler(SamplingParams(seed=1, temperature=0.5), 0, [1], 300)
    wide = torch.randn(4, 600, generator=torch.Generator().manual_seed(1))
    logits = wide[:, spread][:, :300]
    assert own.choose(logits, range(4), [[]] * 4) == own.choose(logits.clone(), range(4), [[]] * 4)


ALONE = """
import threading, torch
from pathlib import Path
from hasten import SamplingParams
from hasten.engine.sampling.sampler import Sampler

torch.set_num_threads(4)
logits = torch.zeros(2, 49152)
for settings in ({}, {"top_k": 50}, {"top_p": 0.9}, {"repetition_penalty": 1.2}):
    own = Sampler(SamplingParams(temperature=0.8, seed=1, **settings), 0, [1], 49152)
    before = len(list(Path("/proc/self/task").iterdir()))
    own.choose(logits, [1, 2], [[], [3]])
    assert len(list(Path("/proc/self/task").iterdir())) == before, settings
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
def test_no_team_of_threads_chooses() -> None:
    """In a process of its own, where PyTorch has none yet."""
    subprocess.run([sys.executable, "-c", ALONE], check=True)


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_frequencies(scale: float) -> None:
    """The bound on noise leaves no draw out: chi-squared over what is expected at least five times."""
    from scipy.stats import chisquare

    draws, size = 20_000, 600
    logits = scale * torch.randn(1, size, generator=torch.Generator().manual_seed(2))
    own = Sampler(SamplingParams(seed=9, temperature=0.8), 0, [1], size)
    drawn = np.bincount(own.choose(logits.expand(draws, -1), range(draws), [()] * draws), minlength=size)
    expected = draws * own.distribution(logits, [[]]).dense(0).numpy()
    often = expected >= 5
    counted, wanted = np.append(drawn[often], drawn[~often].sum()), np.append(expected[often], expected[~often].sum())
    assert chisquare(counted[wanted > 0], wanted[wanted > 0]).pvalue > 1e-3


def test_the_key_of_a_position_goes_on_from_the_stream(either: Callable[[], None]) -> None:
    one, other = (Sampler(SamplingParams(seed=5, temperature=1.0), choice, [1], 50) for choice in (0, 1))
    flat = torch.zeros(40, 50)
    first = one.choose(flat, range(40), [[]] * 40)
    assert first == [int(one.perturbed(one.distribution(flat[:1], [[]]), [at]).argmax()) for at in range(40)]
    assert first != other.choose(flat, range(40), [[]] * 40)
