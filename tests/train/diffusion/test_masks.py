"""Training masks, entry by entry, against the papers' rules written as loops."""

from __future__ import annotations

import pytest
import torch

from hasten.train.diffusion.masks import aligned_blocks, answer_blocks, two_copies


@pytest.mark.parametrize("block", [2, 4])
@pytest.mark.parametrize("context", ["causal", "block-causal"])
@pytest.mark.parametrize("first", [0, 3])
def test_two_copies_of_eight_positions(block: int, context: str, first: int):
    blocks = torch.stack([torch.arange(8) // block, (torch.arange(8) + 1) // block])
    visible = two_copies(blocks, first, context)
    assert visible.shape == (2, 16 - first, 16 - first)
    rows = [("noised", position) for position in range(first, 8)] + [("clean", position) for position in range(8)]
    for text in range(2):
        number = blocks[text].tolist()
        for i, (copy, p) in enumerate(rows):
            for j, (other, q) in enumerate(rows):
                if copy == "noised":
                    expected = number[q] == number[p] if other == "noised" else number[q] < number[p]
                elif other == "noised":
                    expected = False
                else:
                    expected = q <= p if context == "causal" else number[q] <= number[p]
                assert bool(visible[text, i, j]) == expected, (text, copy, p, other, q)


def test_blocks_of_an_answer_begin_with_it():
    blocks = answer_blocks(torch.tensor([3, 0, 3]), 8, 4, torch.tensor([0, 0, 3]))
    assert blocks.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2], [1, 1, 1, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 2, 2, 2]]


def test_aligned_blocks_do_not_look_at_the_prompt():
    assert aligned_blocks(torch.zeros(2, 5, dtype=torch.bool), 2).tolist() == [[0, 0, 1, 1, 2]] * 2
