"""The radix tree finds what a look at every text finds."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hasten.cache.radix import Node, RadixTree, agreeing

texts = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)


def tokens(text: tuple[int, ...]) -> np.ndarray:
    return np.asarray(text, dtype=np.int64)


def common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@given(
    program=st.lists(st.tuples(st.booleans(), texts, st.integers(0, 99)), max_size=30),
    asked=st.lists(texts, max_size=5),
)
def test_against_all_texts(program: list[tuple[bool, tuple[int, ...], int]], asked: list[tuple[int, ...]]) -> None:
    tree: RadixTree[int] = RadixTree()
    known: dict[int, tuple[tuple[int, ...], Node[int]]] = {}
    for number, (adds, text, which) in enumerate(program):
        if adds or not known:
            known[number] = text, tree.add(tokens(text), number)
        else:
            gone = list(known)[which % len(known)]
            tree.remove(known.pop(gone)[1], gone)
        assert bool(tree) == bool(known)
        for text in asked:
            found = list(tree.nearest(tokens(text)))
            expected = {item: length for item, (other, _) in known.items() if (length := common(other, text))}
            assert dict(found) == expected and len(found) == len(expected)
            assert [length for _, length in found] == sorted(expected.values(), reverse=True)
        for item, (text, node) in known.items():
            shorter = [other for other, (its, _) in known.items() if len(its) < len(text) and its == text[: len(its)]]
            assert sorted(node.above()) == shorter, item


def test_a_tree_that_is_empty_again_holds_nothing() -> None:
    tree: RadixTree[str] = RadixTree()
    nodes = [(tree.add(tokens(text), str(text)), str(text)) for text in ((1, 2, 3), (1, 2), (1, 2, 4), (5,))]
    for node, item in nodes:
        tree.remove(node, item)
    assert not tree and list(tree.nearest(tokens((1, 2)))) == []


def test_how_much_two_texts_have_in_common() -> None:
    assert agreeing(tokens((1, 2, 3)), tokens((1, 2, 4))) == 2
    assert agreeing(tokens((1, 2)), tokens((1, 2, 4))) == 2
    assert agreeing(tokens(()), tokens((1,))) == 0
