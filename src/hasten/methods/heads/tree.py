"""Trees of ranks: which combinations of each level's likeliest tokens are worth verifying.

A node is a path of ranks, (0, 2) being the third token of the second level below the first of the first. With levels
that know nothing of each other a path's probability is the product of its tokens', so the best tree of n nodes is the n
largest products (Medusa, 2401.10774, section 2.3.3). Ranks come in falling order, so that every path comes after its
beginnings and its better siblings: the tree is closed, and each of its beginnings is the best tree of its size.

Sequoia (2402.12374, section 3.1) finds the best static tree from how often each rank is right by a dynamic programme
over nodes, depth and children. Where chances multiply along a path, its optimum is the same products, for all sizes at
once; the tests hold its recursion against them. How much of a tree then pays on a machine is `Sizing`'s to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

from hasten.engine import ROOT, Draft
from hasten.methods.drafters.drawing import Child

Paths = list[tuple[float, tuple[int, ...]]]
"""Probabilities and paths, best first."""


def best_paths(probabilities: Sequence[Sequence[float]], nodes: int) -> Paths:
    """The most probable paths.

    Args:
        probabilities: per level, of its ranks, falling. So many levels bound the depth, so many ranks the width.
        nodes: how many; fewer where there are no more, or the rest is impossible.
    """
    paths: Paths = []
    # What stands in the heap: minus a path's probability, that of its parent, and the path.
    heap: list[tuple[float, float, tuple[int, ...]]] = []

    def consider(parent: float, path: tuple[int, ...]) -> None:
        level = len(path) - 1
        if level < len(probabilities) and path[-1] < len(probabilities[level]):
            probability = parent * probabilities[level][path[-1]]
            if probability > 0:
                heappush(heap, (-probability, parent, path))

    consider(1.0, (0,))
    while heap and len(paths) < nodes:
        negative, parent, path = heappop(heap)
        paths.append((-negative, path))
        consider(parent, (*path[:-1], path[-1] + 1))
        consider(-negative, (*path, 0))
    return paths


def static_paths(accuracy: Sequence[Sequence[float]], nodes: int) -> Paths:
    """The best tree for measured ranks, which are in any order: by chance a later one was right more often.

    Args:
        accuracy: per level, how often each rank was right.
        nodes: as `best_paths` has them.
    """
    ordered = [sorted(enumerate(ranks), key=lambda each: -each[1]) for ranks in accuracy]
    falling = [[share for _, share in ranks] for ranks in ordered]
    return [
        (probability, tuple(ranks[place][0] for ranks, place in zip(ordered, path, strict=False)))
        for probability, path in best_paths(falling, nodes)
    ]


def drawn_up(paths: Sequence[tuple[float, tuple[int, ...]]], tokens: Sequence[Sequence[int]]) -> Draft:
    """The draft of some paths, each after its beginning.

    Args:
        paths: as `best_paths` gives them.
        tokens: per level, of its ranks; no token twice.
    """
    draft = Draft()
    number: dict[tuple[int, ...], int] = {(): ROOT}
    for probability, path in paths:
        number[path] = len(draft)
        draft.tokens.append(tokens[len(path) - 1][path[-1]])
        draft.parents.append(number[path[:-1]])
        draft.estimates.append(probability)
    return draft


def best_of_levels(levels: Sequence[Sequence[Child]], nodes: int) -> Draft:
    """The best tree where all nodes of a level have the same children."""
    falling = [sorted(level, key=lambda child: -child[1]) for level in levels]
    paths = best_paths([[probability for _, probability in level] for level in falling], nodes)
    return drawn_up(paths, [[token for token, _ in level] for level in falling])


def at_rates(children: Sequence[Child], rates: Sequence[float]) -> list[Child]:
    """Children with how often each rank of their level was right, in place of their own probabilities."""
    return [(token, rate) for (token, _), rate in zip(children, rates, strict=False)]


class Expansion:
    """A tree that grows by levels, where a token's probability depends on its path (EAGLE-2, 2406.16858, section 4.1).

    Probabilities multiply, so what is not among the best nodes now never will be: growing it is in vain.

    Args:
        nodes: of the tree, at most.

    Attributes:
        all: nodes that were added, those included that are not among the best.
    """

    def __init__(self, nodes: int) -> None:
        self.nodes, self.all = nodes, Draft()
        self._level = 0

    def add(self, parent: int, children: Iterable[Child]) -> None:
        """Children of a node, or of `ROOT`: their tokens, no token twice, and their probabilities behind it."""
        path = 1.0 if parent == ROOT else self.all.estimates[parent]
        for token, probability in children:
            if probability > 0:
                self.all.tokens.append(token)
                self.all.parents.append(parent)
                # Rounding must not make a child better than its parent.
                self.all.estimates.append(path * min(1.0, probability))

    def frontier(self, most: int, least: float = 0.0) -> list[int]:
        """Of the nodes that were added since it was asked last, those to add children to, the best `most`.

        None where their probabilities do not come to `least` together: so little is not worth a pass.
        """
        fresh = [node for node in self._best() if node >= self._level][:most]
        self._level = len(self.all)
        return fresh if sum(self.all.estimates[node] for node in fresh) >= least else []

    def best(self) -> Draft:
        """The draft of the best nodes, each after its parent."""
        return self.all.subset(self._best())

    def _best(self) -> list[int]:
        # Of equal ones the first, which come after their parents.
        return sorted(range(len(self.all)), key=lambda node: -self.all.estimates[node])[: self.nodes]
