"""What a view says of its rows, against the plain formulas."""

from __future__ import annotations

import pytest
import torch

from hasten.engine import Canvas, Hypothesis, SamplingParams, View
from hasten.engine.sampling.sampler import Sampler

VOCABULARY, MASK, START = 8, 7, 2


def new_view(
    rows: int = 4,
    active: int = 3,
    decided: tuple[int, ...] = (),
    hypothesis: Hypothesis | None = None,
    **params: float,
) -> View:
    prompt = [1] * START
    sampler = Sampler(SamplingParams(**{"seed": 1, **params}), 0, prompt, VOCABULARY)  # type: ignore[arg-type]
    canvas = Canvas(prompt, START + rows, MASK, sampler, end_ids=[3])
    if decided:
        canvas.commit(torch.tensor(decided) + START, torch.full((len(decided),), 6))
    logits = 2 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(rows))
    logits[:, MASK] = -torch.inf
    return View(canvas, START, logits, active, hypothesis)


def test_scores_are_those_of_the_model_itself() -> None:
    """Whatever the temperature and the penalties."""
    for params in ({}, {"temperature": 3.0, "repetition_penalty": 2.0, "top_k": 2}):
        view = new_view(**params)
        chances = view.logits.double().softmax(-1)
        assert view.confidence.tolist() == pytest.approx(
            [float(chances[row, token]) for row, token in enumerate(view.tokens)]
        )
        ranked = chances.sort(descending=True).values
        assert view.margin.tolist() == pytest.approx((ranked[:, 0] - ranked[:, 1]).tolist())
        entropies = torch.distributions.Categorical(probs=chances).entropy()
        assert view.entropy.tolist() == pytest.approx(entropies.tolist())
        raw = view.logits.sort(descending=True).values
        assert view.gaps.tolist() == pytest.approx((raw[:, 0] - raw[:, 1]).tolist())
        assert view.ends.tolist() == [token == 3 for token in view.tokens.tolist()]


def test_tokens_are_the_likeliest_or_the_draw_of_the_position() -> None:
    view = new_view()
    assert view.tokens.tolist() == view.logits.argmax(-1).tolist()
    drawn = new_view(temperature=1.5)
    expected = drawn.canvas.sampler.choose(drawn.logits, range(START, START + 4), [()] * 4)
    assert drawn.tokens.tolist() == expected


def test_only_masked_rows_of_the_active_part_are_open() -> None:
    view = new_view(decided=(1,))
    assert view.masked.tolist() == [True, False, True, True]
    assert view.open.tolist() == [True, False, True, False]
    assert view.ranking(torch.tensor([1.0, 9.0, 2.0, 8.0])).tolist() == [2, 0]
    assert view.best(torch.tensor([1.0, 9.0, 2.0, 8.0])).tolist() == [False, False, True, False]
    assert view.best(torch.tensor([1.0, 9.0, 2.0, 8.0]), 5).tolist() == [True, False, True, False]
    # Of equal ones, the first.
    assert view.ranking(torch.ones(4)).tolist() == [0, 2]
    assert view.ranking(torch.full((4,), -torch.inf)).tolist() == [0, 2]


def test_commit_writes_tokens_and_a_view_stays_what_it_was() -> None:
    view = new_view(decided=(1,))
    view.commit(torch.tensor([True, False, True, False]))
    tokens = view.tokens.tolist()
    assert view.canvas.ids.tolist() == [1, 1, tokens[0], 6, tokens[2], MASK]
    assert view.open.tolist() == [True, False, True, False]


def test_a_hypothesis_is_looked_at_instead_of_the_canvas() -> None:
    """It begins one position before the view; penalties count its path, and only once when it is decided."""
    contents = Hypothesis(
        START - 1, torch.tensor([1, 5, 5, MASK, MASK]), torch.tensor([False, False, False, True, True]), (5, 5)
    )
    view = new_view(hypothesis=contents, frequency_penalty=2.0)
    assert view.masked.tolist() == [False, False, True, True]
    assert view.open.tolist() == [False, False, True, False]
    expected = view.logits.clone()
    expected[:, 5] -= 4.0
    assert view.decided().tokens.tolist() == expected.argmax(-1).tolist()
    view.canvas.commit(torch.tensor([START, START + 1]), torch.tensor([5, 5]))
    assert view.tokens.tolist() == expected.argmax(-1).tolist()
    other = Hypothesis(contents.start, contents.ids, torch.ones(5, dtype=torch.bool), (5, 5))
    assert contents.same(contents)
    assert not contents.same(other)
