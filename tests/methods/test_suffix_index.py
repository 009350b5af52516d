"""The index counts what the dictionary of all substrings counts, through appends in turns and removals."""

from __future__ import annotations

import random
from collections.abc import Sequence

from counting import Counts
from hypothesis import given
from hypothesis import strategies as st

from hasten.methods.drafters.suffix_index import SuffixIndex


def check(index: SuffixIndex, counts: Counts, context: Sequence[int]) -> int:
    """All suffixes of a context that occur are found, once each, with their counts; returns how many."""
    context = tuple(context)[-(counts.depth - 1) :]
    known = 0
    while known < len(context) and context[len(context) - known - 1 :] in counts.count:
        known += 1
    unseen = known
    for state, longest, shortest in index.matches(context):
        assert longest == unseen >= shortest
        for size in {longest, shortest}:
            string = context[len(context) - size :]
            following = counts.next(string)
            assert index.count(state) == counts.count[string]
            assert [(count, token) for count, token, _ in index.following(state, 1)] == following
            assert [(count, token) for count, token, _ in index.following(state, 2)] == [
                each for each in following if each[0] >= 2
            ]
            likeliest = index.likeliest(state)
            assert (likeliest and likeliest[:2]) == max(following, key=lambda each: each[0], default=None)
        unseen = shortest - 1
    assert unseen == 0
    return known


@given(
    st.integers(2, 9),
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, 5), st.lists(st.integers(0, 3), max_size=8)),
            st.integers(0, 5),
        ),
        max_size=30,
    ),
)
def test_counts_are_those_of_all_substrings(depth, changes):
    """A pair appends to a sequence (a new one where there is none of that number), a number alone removes one."""
    index, counts = SuffixIndex(depth), Counts(depth)
    for change in changes:
        live = list(counts.sequences)
        if isinstance(change, int):
            if change < len(live):
                index.remove(live[change])
                counts.remove(live[change])
        else:
            position, tokens = change
            number = live[position] if position < len(live) else index.add()
            if number not in counts.sequences:
                assert counts.add() == number
            index.extend(number, tokens)
            counts.extend(number, tokens)
            assert index.tokens(number) == counts.sequences[number]
        for tokens in counts.sequences.values():
            check(index, counts, tokens)
            check(index, counts, tokens[:-1])
    assert len(index) == len(counts.sequences)
    for number in list(counts.sequences):
        index.remove(number)
    assert (len(index), index.states) == (0, 0)


def test_random_contexts():
    """Ten thousand lookups over alphabets of 1 to 50 tokens, most of them of text that occurs."""
    lookups = found = 0
    for seed in range(150):
        rng = random.Random(seed)
        alphabet, depth = rng.choice([1, 2, 3, 5, 20, 50]), rng.choice([2, 3, 8, 24])
        index, counts = SuffixIndex(depth), Counts(depth)
        for _ in range(rng.randrange(5, 30)):
            live = list(counts.sequences)
            if len(live) > 2 and rng.random() < 0.3:
                number = rng.choice(live)
                index.remove(number)
                counts.remove(number)
                continue
            number = rng.choice(live) if live and rng.random() < 0.7 else index.add()
            if number not in counts.sequences:
                counts.add()
            source = counts.sequences[rng.choice(live)] if live else []
            start = rng.randrange(len(source) + 1)
            tokens = source[start : start + 6] + [rng.randrange(alphabet) for _ in range(rng.randrange(1, 6))]
            index.extend(number, tokens)
            counts.extend(number, tokens)
            for _ in range(5):
                text = counts.sequences[rng.choice(list(counts.sequences))]
                stop = rng.randrange(len(text) + 1)
                context = [*text[max(0, stop - 10) : stop], *[rng.randrange(alphabet)] * rng.randrange(2)]
                found += check(index, counts, context) > 0
                lookups += 1
    assert lookups >= 10_000
    assert found > lookups // 2


def test_long_repetition():
    """Beyond the depth nothing is counted, and nothing grows with the repetition."""
    index, counts = SuffixIndex(4), Counts(4)
    for tokens in ([7] * 300, [1, 2] * 150):
        number = index.add()
        counts.add()
        index.extend(number, tokens)
        counts.extend(number, tokens)
        assert check(index, counts, tokens[-3:]) == 3
    assert [(longest, shortest) for _, longest, shortest in index.matches([7, 7, 7])] == [(3, 3), (2, 2), (1, 1)]
    assert index.states <= 1200
    index.remove(0)
    counts.remove(0)
    assert list(index.matches([7])) == []
    assert check(index, counts, [2, 1, 2]) == 3


def test_states_are_used_again():
    """A window of sequences that moves on does not grow."""
    rng = random.Random(0)
    index = SuffixIndex(16)
    sizes = []
    for number in range(60):
        assert index.add() == number
        index.extend(number, [rng.randrange(5) for _ in range(50)])
        if number >= 4:
            index.remove(number - 4)
            sizes.append(index.memory_bytes)
    assert index.states <= 2 * 4 * 50
    assert max(sizes[30:]) <= 1.3 * max(sizes[:10])
