"""How a drafter's children are drawn: the likeliest, in the order of shared noise, or by coins of its own.

What a request asks for decides: greedy requests get the likeliest (`likeliest`), `acceptance="match"` the order that
the target's own noise gives the drafter's distribution (`Matching`, `order_of_noise`), the other rules samples without
replacement (`sampled`), which the draft says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import log

import numpy as np
from torch import Tensor

from hasten.engine import ROOT, Draft, Drawn, Observation, Request
from hasten.engine.sampling.noise import Uniforms
from hasten.engine.sampling.sampler import Distribution, Sampler
from hasten.methods.drafters.shared_noise import Belief, together

Child = tuple[int, float]
"""A token, and the probability that it is the target's."""


def processed(sampler: Sampler, logits: Tensor, paths: Sequence[Sequence[int]]) -> Distribution:
    """What a request's sampling makes of logits [rows, vocabulary]; untempered and unfiltered where it is greedy.

    Args:
        paths: per row, the drafted tokens above it.
    """
    if sampler.params.greedy:
        return Distribution(sampler.adjusted(logits, paths), None, sampler.vocabulary)
    return sampler.distribution(logits, paths)


def likeliest(distribution: Distribution, most: int) -> list[list[Child]]:
    """Of each row, at most so many tokens, likeliest first, with the drafter's own probability."""
    likelihoods = distribution.scores.softmax(-1)
    likelihoods, columns = likelihoods.topk(min(most, likelihoods.shape[1]), -1)
    tokens = columns if distribution.ids is None else distribution.ids.gather(1, columns)
    # A filtered token has a place in the order all the same, but no probability (or none at all, if all are).
    return [
        [pair for pair in zip(*row, strict=True) if pair[1] > 0]
        for row in zip(tokens.tolist(), likelihoods.tolist(), strict=True)
    ]


def sampled(draft: Draft, node: int, q: Tensor, ids: Tensor | None, coins: Uniforms) -> Iterator[Child]:
    """Children of a node drawn without replacement, each as it is asked for, and their q; the draft is told of it.

    The residual stays implicit: a coin is a point of what is left of the unit interval, and skips the pieces of it
    that earlier children have taken.

    Args:
        q: float64 [tokens] on the CPU.
        ids: int64 [tokens], whose probabilities these are; None where it is the whole vocabulary.
    """
    draft.drawn[node] = Drawn(q, ids, replacement=False)
    piece, end = q.numpy(), q.cumsum(0).numpy()
    taken: list[int] = []
    left = float(end[-1])
    while True:
        point = coins.draw() * left
        for column in sorted(taken):
            if point < end[column] - piece[column]:
                break
            point += piece[column]
        column = int(np.searchsorted(end, point, side="right"))
        if column == len(piece) or piece[column] <= 0 or column in taken:
            # Rounding can miss by a hair, or nothing is left.
            others = piece.copy()
            others[taken] = 0
            column = int(others.argmax())
            if others[column] <= 0:
                return
        taken.append(column)
        left -= piece[column]
        yield (column if ids is None else int(ids[column])), float(piece[column])


def sampled_bytes(sampler: Sampler, nodes: int, tokens: int) -> int:
    """Of what `sampled` draws the children of so many nodes from, at most: q, its ids and its sums.

    Nothing where a request's children are not sampled.

    Args:
        tokens: of each distribution.
    """
    params = sampler.params
    if params.greedy or params.acceptance == "match":
        return 0
    named = sampler.kept < sampler.vocabulary or params.top_p < 1
    # One more: what is left of a distribution, where rounding has missed.
    return (nodes * (3 if named else 2) + 1) * 8 * tokens


def order_of_noise(sampler: Sampler, position: int, ids: Sequence[int], q: Sequence[float], most: int) -> list[int]:
    """Which of a few tokens come first with shared noise, in plain numbers: there, tensors cost more than they save."""
    noise = sampler.noise(position, ids)
    scores = [log(p) + gumbel for p, gumbel in zip(q, noise, strict=True)]
    return sorted(range(len(ids)), key=scores.__getitem__, reverse=True)[:most]


class Matching:
    """The children of one draft with shared noise, and what the request's belief says of them, and learns of it.

    Attributes:
        cases: what `Belief` is made of, per parent and token that was taken.
    """

    def __init__(self, request: Request, belief: Belief) -> None:
        self.belief, self.cases = belief, dict[tuple[int, int], tuple[float, float]]()
        self.start, self._sampler = len(request.tokens), request.sampler

    def children(
        self, distribution: Distribution, nodes: Sequence[int], paths: Sequence[Sequence[int]], most: int
    ) -> list[Iterator[Child]]:
        """At most so many children of each node, the target's own draw from such a distribution first.

        Args:
            distribution: of what follows each node.
            paths: per node, the drafted tokens down to it.
        """
        perturbed = self._sampler.perturbed(distribution, [self.start + len(path) for path in paths])
        columns = perturbed.topk(min(most, perturbed.shape[1]), -1).indices
        each = (
            columns if distribution.ids is None else distribution.ids.gather(1, columns),
            distribution.scores.softmax(-1).gather(1, columns),
            together(perturbed, self._sampler.params.temperature).gather(1, columns),
        )
        rows = zip(nodes, *(part.tolist() for part in each), strict=True)
        return [self._likely(node, zip(*parts, strict=True)) for node, *parts in rows]

    def surest(
        self, nodes: Sequence[int], tokens: Tensor, alone: Tensor, alike: Tensor, most: int
    ) -> list[list[Child]]:
        """At most so many children of each node, likeliest first: by the noise as far as the belief goes by it.

        Args:
            tokens: int64 [nodes, candidates], any order.
            alone, alike: [nodes, candidates], of what `Belief` is made.
        """
        columns = self.belief.of(alone, alike).topk(min(most, tokens.shape[1]), -1).indices
        rows = zip(nodes, *(part.gather(1, columns).tolist() for part in (tokens, alone, alike)), strict=True)
        return [list(self._likely(node, zip(*parts, strict=True))) for node, *parts in rows]

    def _likely(self, node: int, tokens: Iterable[tuple[int, float, float]]) -> Iterator[Child]:
        """A filtered token has a place in the order, but no probability."""
        for token, *cases in tokens:
            probability = self.belief.of(*cases)
            if probability > 0:
                self.cases[node, token] = (cases[0], cases[1])
                yield token, probability

    def judge(self, draft: Draft, came: Sequence[int]) -> None:
        """Tell the belief which children of the whole draft were right, down the path of the tokens that came."""
        below, node = draft.children(), ROOT
        for token in came:
            right = None
            for child in below.get(node, ()):
                drafted = draft.tokens[child]
                self.belief.learn(*self.cases[node, drafted], drafted == token)
                if drafted == token:
                    right = child
            if right is None:
                return
            node = right


class Beliefs:
    """How the targets of a drafter's requests draw beside it with shared noise."""

    def __init__(self) -> None:
        self._beliefs: dict[int, Belief] = {}
        self._drafted: dict[int, tuple[Matching, Draft]] = {}

    def of(self, request: Request) -> Belief:
        """The request's, begun on demand."""
        return self._beliefs.setdefault(request.id, Belief())

    def drafted(self, request: Request, matching: Matching, draft: Draft) -> None:
        """The request's latest draft, before anything was cut from it."""
        if matching.cases:
            self._drafted[request.id] = matching, draft

    def observe(self, request: Request, seen: Observation) -> None:
        """Judge the last draft by the tokens that came, whoever's was verified, if they came where it began."""
        matching, draft = self._drafted.pop(request.id, (None, None))
        if matching is not None and draft is not None and matching.start == len(request.tokens) - len(seen.tokens):
            matching.judge(draft, seen.tokens)

    def end(self, request: Request) -> None:
        """The request is over."""
        self._beliefs.pop(request.id, None)
        self._drafted.pop(request.id, None)
