"""A radix tree over token ids: which of many texts begins as another one does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
T = TypeVar("T")


class Node(Generic[T]):
    """Where a text ends, or texts part.

    Attributes:
        tokens: those between its parent and here.
        items: whose texts end here, in the order in which they came.
        children: by their first token.
    """

    __slots__ = ("children", "items", "parent", "tokens")

    def __init__(self, tokens: Tokens, parent: Node[T] | None = None) -> None:
        self.tokens, self.parent = tokens, parent
        self.items: dict[T, None] = {}
        self.children: dict[int, Node[T]] = {}

    def hang(self, child: Node[T]) -> None:
        """The child's text goes on from here."""
        self.children[int(child.tokens[0])] = child
        child.parent = self

    def below(self, but: Node[T] | None = None) -> Iterator[T]:
        """Items that end here or further on, except below one child; of those that part, the branch that came first."""
        nodes = [self]
        while nodes:
            node = nodes.pop()
            if node is not but:
                yield from node.items
                nodes += reversed(node.children.values())

    def above(self) -> list[T]:
        """Items whose texts this one's begins with, and is longer than."""
        items: list[T] = []
        node = self.parent
        while node is not None:
            items += node.items
            node = node.parent
        return items


class RadixTree(Generic[T]):
    """Items by their texts; several may have the same one."""

    def __init__(self) -> None:
        self._root: Node[T] = Node(np.empty(0, dtype=np.int64))

    def __bool__(self) -> bool:
        return bool(self._root.children)

    def add(self, tokens: Tokens, item: T) -> Node[T]:
        """Enter an item with its text, at least one token; where it stands, to remove it."""
        node = self._root
        while len(tokens):
            child = node.children.get(int(tokens[0]))
            if child is None:
                child = Node(tokens)
                node.hang(child)
            common = agreeing(child.tokens, tokens)
            if common < len(child.tokens):
                # Whoever ends at the child still does.
                upper: Node[T] = Node(child.tokens[:common])
                node.hang(upper)
                child.tokens = child.tokens[common:]
                upper.hang(child)
                child = upper
            node, tokens = child, tokens[common:]
        node.items[item] = None
        return node

    def remove(self, node: Node[T], item: T) -> None:
        """Forget an item, which stands there."""
        del node.items[item]
        while node.parent is not None and not node.items and not node.children:
            del node.parent.children[int(node.tokens[0])]
            node = node.parent
        if node.parent is not None and not node.items and len(node.children) == 1:
            (child,) = node.children.values()
            child.tokens = np.concatenate([node.tokens, child.tokens])
            node.parent.hang(child)

    def nearest(self, tokens: Tokens) -> Iterator[tuple[T, int]]:
        """Items whose texts begin as this one, and with how many equal tokens: those with the most first.

        Nothing may be added or removed before the last one that is taken.
        """
        path: list[tuple[Node[T], int]] = [(self._root, 0)]
        while path[-1][1] < len(tokens):
            node, length = path[-1]
            child = node.children.get(int(tokens[length]))
            if child is None:
                break
            common = agreeing(child.tokens, tokens[length:])
            path.append((child, length + common))
            if common < len(child.tokens):
                break
        seen = None
        for node, length in reversed(path[1:]):
            for item in node.below(seen):
                yield item, length
            seen = node


def agreeing(one: Tokens, other: Tokens) -> int:
    """With how many equal tokens two texts begin."""
    common = min(len(one), len(other))
    differing = np.flatnonzero(one[:common] != other[:common])
    return int(differing[0]) if len(differing) else common
