"""Keyed noise: known values, the right law, independence, and the same bits whatever is computed beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from hasten.engine.sampling.noise import Uniforms, gumbel, gumbels, mix, uniform

SPLITMIX = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
"""The first outputs of SplitMix64 with seed 0, as published with the algorithm."""


def test_known_values():
    assert mix(0) == SPLITMIX[0]
    expected = [((word >> 11) + 0.5) * 2.0**-53 for word in SPLITMIX]
    assert uniform([0], torch.arange(4))[0].tolist() == expected


def unmixed(word: int) -> int:
    """The number that SplitMix64's finaliser makes this word of: each of its steps undone, the last one first."""
    mask = 2**64 - 1
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        undone = word
        for _ in range(64 // shift + 1):
            undone = word ^ (undone >> shift)
        word = undone * pow(factor, -1, 2**64) & mask
    return word


def test_the_largest_word_stays_below_one():
    """The 53 bits that a number is made of may all be ones: their middle rounds to 1, where noise is infinite."""
    golden = 0x9E3779B97F4A7C15
    for last in (2**64 - 1, 2**64 - 2**11):
        key = (unmixed(last) - golden) % 2**64
        assert mix(key) == last
        # Of the words below it, none is changed.
        below = (unmixed(last - 2**11) - golden) % 2**64
        assert uniform([key, below], torch.zeros(1, dtype=torch.int64)).tolist() == [[1 - 2.0**-53], [1 - 2.0**-52]]
        assert torch.isfinite(gumbel([key], torch.zeros(1, dtype=torch.int64))).all()
        assert np.isfinite(gumbels(key, [0])[0]) and gumbels(key, [0])[0] > gumbels(below, [0])[0]
        coins = Uniforms()
        # The state before the word 1 is mixed in.
        coins._key = (unmixed((unmixed(last) - golden - 1) % 2**64) - golden) % 2**64
        assert coins.draw() == 1 - 2.0**-53


def test_mix_depends_on_every_word_and_their_order():
    words = [(1, 2, 3), (1, 3, 2), (2, 1, 3), (1, 2), (1, 2, 3, 0), (0, 1, 2, 3), (1, 2, 4), (-1, 2, 3), (2**70, 2, 3)]
    assert len({mix(*each) for each in words}) == len(words)
    assert all(0 <= mix(*each) < 2**64 for each in words)
    # Half of the output's bits flip with any bit of the input.
    flips = [bin(mix(5, 9) ^ mix(5 ^ (1 << bit), 9)).count("1") for bit in range(64)]
    assert 28 < np.mean(flips) < 36


def test_uniformity():
    keys = [mix(1, key) for key in range(50)]
    drawn = uniform(keys, torch.arange(2000)).numpy()
    assert drawn.min() > 0 and drawn.max() < 1
    values = [kstest(row, "uniform").pvalue for row in drawn]
    assert min(values) > 1e-4
    assert kstest(values, "uniform").pvalue > 0.001
    # Down the keys at one counter, too: that is how positions are drawn.
    assert min(kstest(column, "uniform").pvalue for column in drawn[:, :50].T) > 1e-4


def test_neighbouring_keys_and_counters_are_independent():
    drawn = uniform([mix(seed, 0, 1, 7) for seed in range(2000)], torch.arange(6)).numpy()
    pairs = [(drawn[:-1, 0], drawn[1:, 0]), (drawn[:, 0], drawn[:, 1]), (drawn[:, 4], drawn[:, 5])]
    for one, other in pairs:
        counts = np.histogram2d(one, other, bins=8, range=[[0, 1], [0, 1]])[0]
        assert chisquare(counts.ravel()).pvalue > 0.001


def test_gumbel():
    drawn = gumbel([mix(4)], torch.arange(20000))
    assert drawn.dtype == torch.float32
    assert kstest(drawn[0].double().numpy(), "gumbel_r").pvalue > 0.001
    assert torch.isfinite(gumbel(range(300), torch.arange(1000))).all()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 33, 150, 40000])
def test_same_bits_in_any_company(size):
    keys = [mix(3, key) for key in range(5)]
    counters = torch.arange(size)
    together = gumbel(keys, counters)
    for row, key in enumerate(keys):
        assert torch.equal(gumbel([key], counters)[0], together[row])
    # Some counters, in another order, given per row.
    chosen = torch.tensor([size - 1, size // 2, 0])
    assert torch.equal(gumbel(keys, chosen.repeat(5, 1)), together[:, chosen])


def test_same_bits_with_any_number_of_threads():
    before = torch.get_num_threads()
    try:
        drawn = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            drawn.append(gumbel([mix(8), mix(9)], torch.arange(70000)))
        assert torch.equal(*drawn)
    finally:
        torch.set_num_threads(before)


def test_coins():
    coins, again = Uniforms(1, 2, 3), Uniforms(1, 2, 3)
    drawn = [coins.draw() for _ in range(3000)]
    assert drawn[:10] == [again.draw() for _ in range(10)]
    assert kstest(drawn, "uniform").pvalue > 0.001
    firsts = [Uniforms(0, 0, 2, purpose, position).draw() for purpose in range(3) for position in range(500)]
    assert len(set(firsts)) == 1500
    assert kstest(firsts, "uniform").pvalue > 0.001
