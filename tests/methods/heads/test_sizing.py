"""How much of a tree is verified."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hasten.engine import Draft, Target
from hasten.engine.drafting.cost import VerifyCost
from hasten.methods.heads.sizing import Sizing

TREE = Draft([4, 5, 6], [-1, 0, -1], estimates=[0.6, 0.5, 0.2])


def curve(*seconds: float) -> VerifyCost:
    return VerifyCost((1, 2, 3, 4), (8,), (seconds,), 0.0)


def request(number: int = 0) -> Any:
    return SimpleNamespace(id=number, tokens=[1, 2, 3])


@pytest.fixture
def sized(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(*seconds: float) -> Sizing:
        monkeypatch.setattr("hasten.methods.heads.sizing.verify_cost", lambda model, folder: curve(*seconds))
        return Sizing(Target(None))  # type: ignore[arg-type]

    return make


@pytest.mark.parametrize(
    "seconds, kept",
    [
        ((1.0, 1.0, 1.0, 1.0), [0, 1, 2]),  # rows cost nothing
        ((1.0, 1.3, 1.6, 1.9), [0, 1]),  # 1.6 / 1.3, 2.1 / 1.6 and 2.3 / 1.9 tokens
        ((1.0, 1.5, 3.0, 4.0), [0]),
        ((1.0, 2.0, 3.0, 4.0), []),
    ],
)
def test_what_pays_is_kept(sized, seconds, kept):
    (left,) = sized(*seconds).cut([request()], [TREE])
    assert left.tokens == [TREE.tokens[node] for node in kept]


def test_a_batch_is_sized_together(sized):
    """Rows of all requests are rows of one step."""
    left = sized(1.0, 1.0, 1.1, 3.0).cut([request(0), request(1)], [TREE, TREE])
    assert sum(map(len, left)) == 1
    assert sized(1.0, 1.0, 1.0, 1.0).cut([], []) == []


def test_promises_are_held_against_what_came(sized):
    sizing, one = sized(1.0, 1.4, 1.8, 2.2), request()
    assert len(sizing.cut([one], [TREE])[0]) > 0
    for _ in range(8):
        sizing.cut([one], [TREE])
        sizing.learn(one, SimpleNamespace(tokens=[9]))
    assert len(sizing.cut([one], [TREE])[0]) == 0
    assert len(sizing.cut([request(1)], [TREE])[0]) > 0
    sizing.end(one)
    assert len(sizing.cut([one], [TREE])[0]) > 0


def test_what_was_cut_is_judged_too(sized):
    """A tree that would have been right grows again."""
    sizing, one = sized(1.0, 1.55, 2.1, 2.65), request()
    doubtful = Draft([4, 5, 6], [-1, 0, -1], estimates=[0.5, 0.4, 0.3])
    assert len(sizing.cut([one], [doubtful])[0]) == 0
    for _ in range(8):
        sizing.learn(one, SimpleNamespace(tokens=[4, 5, 7]))
        left = sizing.cut([one], [doubtful])[0]
    assert left.tokens == [4, 5]
