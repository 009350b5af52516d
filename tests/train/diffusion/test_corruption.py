"""What is hidden: only answers, and as often as the papers say."""

from __future__ import annotations

import pytest
import torch

from hasten.train.diffusion import corruption


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def answer() -> torch.Tensor:
    """4,000 rows of 12 positions, of which the last 8 are the answer."""
    answer = torch.zeros(4_000, 12, dtype=torch.bool)
    answer[:, 4:] = True
    return answer


def test_counts_are_uniform_and_so_are_positions(answer: torch.Tensor, generator: torch.Generator):
    hidden, share = corruption.uniform_count(answer, generator)
    counts = hidden.sum(1)
    assert torch.equal(share[:, 0] * 8, counts.float())
    assert not hidden[:, :4].any()
    # The draws are spread over the rows: each count has its eighth of them, but for the edges of the strata.
    assert (counts.bincount(minlength=9)[1:] - 500).abs().max() <= 1
    # A position is hidden in 9/16 of the rows; five standard deviations are 0.04.
    assert (hidden[:, 4:].float().mean(0) - 9 / 16).abs().max() < 0.04
    # One over the share makes every position count once in the mean.
    assert ((hidden / share)[:, 4:].mean(0) - 1).abs().max() < 0.1


def test_a_row_without_an_answer_hides_nothing(generator: torch.Generator):
    answer = torch.tensor([[False, False], [False, True]])
    hidden, share = corruption.uniform_count(answer, generator)
    assert torch.equal(hidden, answer) and share.tolist() == [[1], [1]]


def test_every_choice_of_positions_is_equally_likely(generator: torch.Generator):
    answer = torch.tensor([[False, True, True, True, True]]).expand(6_000, -1)
    hidden = corruption.exactly(answer, torch.full((6_000,), 2), generator)
    assert (hidden.sum(1) == 2).all() and not hidden[:, 0].any()
    counts = (hidden.long() @ torch.tensor([0, 1, 2, 4, 8])).bincount()
    observed = counts[counts > 0].float()
    assert len(observed) == 6
    assert ((observed - 1_000) ** 2 / 1_000).sum() < 20.5  # chi-square with 5 degrees of freedom, p = 0.001


def test_each_block_has_a_rate_of_its_own(answer: torch.Tensor, generator: torch.Generator):
    blocks = (torch.arange(12) // 4).expand(answer.shape)
    hidden = corruption.per_block(answer, blocks, generator)
    assert not hidden[:, :4].any()
    counts = torch.stack([hidden[:, 4:8].sum(1), hidden[:, 8:].sum(1)])
    # With t ~ U(0, 1), the number hidden of four is uniform on 0..4 (beta-binomial); blocks are independent.
    for block in counts:
        assert ((block.bincount(minlength=5) - 800).float() ** 2 / 800).sum() < 18.5  # 4 degrees of freedom, p = 0.001
    assert torch.corrcoef(counts.float())[0, 1].abs() < 0.06


def test_views_partition_what_they_split(answer: torch.Tensor, generator: torch.Generator):
    one = corruption.per_block(answer, torch.zeros_like(answer, dtype=torch.int64), generator)
    for first, second in ((one, corruption.complement(answer, one)), corruption.two_views(answer, generator)):
        assert torch.equal(first | second, answer) and not (first & second).any()
    assert abs(first[:, 4:].float().mean() - 0.5) < 0.015


def test_a_drawn_block_is_where_a_decoder_could_be(generator: torch.Generator):
    answer = torch.zeros(3_000, 14, dtype=torch.bool)
    answer[:, 3:] = True
    blocks = ((torch.arange(14) + 1) // 4).expand(answer.shape)
    segment, later = corruption.draw_block(answer, torch.full((3_000,), 6), blocks, generator)
    seen = set()
    for row in range(3_000):
        start = 3 + 4 * int(later[row].logical_not()[3:].sum() // 4 - 1)
        seen.add(start)
        assert segment[row].nonzero()[:, 0].tolist() == list(range(start, start + 4))
        assert later[row].nonzero()[:, 0].tolist() == list(range(start + 4, 14))
    # Six positions are reached: four of them in the first block, two in the second.
    assert seen == {3, 7}
    assert segment[:, 3].float().mean() == pytest.approx(4 / 6, abs=0.04)


def test_hiding_leaves_the_rest():
    hidden = torch.tensor([[False, True, False]])
    assert corruption.hide(torch.tensor([[5, 6, 7]]), hidden, 9).tolist() == [[5, 9, 7]]
