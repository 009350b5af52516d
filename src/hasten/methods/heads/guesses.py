"""What a head takes for the next tokens, and how a target's noise changes that.

A target that samples takes the largest of score plus noise, and the noise of each token at each position is known
before (`engine/sampling/noise.py`). So where a request samples, a word's probability is no longer the head's alone:
`Belief` mixes it with what it would be if the target drew as the head does, and learns in each request how much of
either holds (`drafters/shared_noise.py`). What is drafted never changes what is drawn: the law and the tokens are those
of plain decoding, by the rules of deterministic children.

Of a request's sampling only the temperature is looked at. The filters are the target's: what a head leaves out by its
own nucleus, which is often another one, is lost (measured: Medusa's tokens per step fell by a twentieth at top-p 0.9).
Not with `acceptance="typical"`, which takes what is probable, whatever the noise says.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, islice
from typing import NamedTuple

import torch
from torch import Tensor

from hasten.engine import Draft, Observation, Request
from hasten.engine.memory import logits_bytes
from hasten.engine.sampling.sampler import Distribution
from hasten.methods.drafters.drawing import Beliefs, Child, Matching
from hasten.model.ranking import rank

CANDIDATES = 64
"""Likeliest words of a row, of which the noise may choose: it rarely lifts another one to the top."""
CANDIDATE_BYTES = 64
"""Of such a word: its token, its probabilities, and the noise with what that is made of."""


class Place(NamedTuple):
    """Where children are asked for: behind a node of a request's draft.

    Attributes:
        request: the draft's.
        node: its number, which is `ROOT` at the top.
        depth: of the node; 0 at the top.
    """

    request: Request
    node: int
    depth: int


class Guesses:
    """Children of nodes, by a head's logits.

    Args:
        words: int64 [words], the tokens of a row of logits; None where these are the same.
        noise: whether the target's noise counts. It does not where children are ranked by what was measured of ranks.
    """

    def __init__(self, words: Tensor | None, noise: bool = True) -> None:
        self._words, self._noise, self._beliefs = words, noise, Beliefs()
        self._open: dict[int, Matching] = {}

    def begin(self, requests: Sequence[Request]) -> None:
        """These requests' drafts begin."""
        self._open = {
            request.id: Matching(request, self._beliefs.of(request))
            for request in requests
            if self._noise and not request.params.greedy and request.params.acceptance != "typical"
        }

    @property
    def noisy(self) -> bool:
        """Whether noise counts for some of the requests whose drafts have begun."""
        return bool(self._open)

    def behind(self, places: Sequence[Place], logits: Tensor, most: int) -> list[list[Child]]:
        """At most so many children behind each place with the probability that each is the target's, likeliest first.

        Args:
            places: those of a request beside each other.
            logits: [places, words].
        """
        values, numbers, masses = rank(logits, CANDIDATES if self._open else most)
        tokens = numbers if self._words is None else self._words[numbers]
        alone = torch.exp(values - masses.unsqueeze(-1))
        found: list[list[Child]] = []
        for own, group in groupby(places, key=lambda place: self._open.get(place.request.id)):
            some = list(group)
            rows = slice(len(found), len(found) + len(some))
            if own is None:
                pairs = zip(tokens[rows, :most].tolist(), alone[rows, :most].tolist(), strict=True)
                found += [list(zip(*row, strict=True)) for row in pairs]
            else:
                alike = _alike(some, values[rows], tokens[rows]) * alone[rows].sum(-1, keepdim=True)
                found += own.surest([place.node for place in some], tokens[rows], alone[rows], alike, most)
        return found

    @staticmethod
    def scratch_bytes(rows: int, words: int) -> int:
        """Bytes that so many rows' logits, and the children by them, take for a while, at most.

        The logits as they come (or twice, where they are joined), as float32, and what their sum of exponentials is
        made of.
        """
        return 3 * logits_bytes(rows, words) + rows * min(CANDIDATES, words) * CANDIDATE_BYTES

    def levels(
        self, requests: Sequence[Request], counts: Sequence[int], logits: Tensor, most: int
    ) -> list[list[list[Child]]]:
        """Of each request and level, the children that all nodes have whose level is the one above.

        Args:
            counts: of each request's levels.
            logits: [levels of all, words].
        """
        places = [
            Place(request, level, level)
            for request, count in zip(requests, counts, strict=True)
            for level in range(count)
        ]
        found = iter(self.behind(places, logits, most))
        return [list(islice(found, count)) for count in counts]

    def made(self, request: Request, draft: Draft) -> None:
        """The whole draft whose children these were, by which the request's belief is judged."""
        if matching := self._open.get(request.id):
            self._beliefs.drafted(request, matching, draft)

    def made_of_levels(self, request: Request, draft: Draft) -> None:
        """The same where nodes have the children of their level, which stood in the place of a node."""
        if matching := self._open.get(request.id):
            levels = zip(draft.parents, draft.tokens, draft.depths(), strict=True)
            matching.cases = {(parent, token): matching.cases[depth - 1, token] for parent, token, depth in levels}
            self.made(request, draft)

    def observe(self, request: Request, seen: Observation) -> None:
        """Tokens came."""
        self._beliefs.observe(request, seen)

    def end(self, request: Request) -> None:
        """The request is over."""
        self._beliefs.end(request)


def _alike(places: Sequence[Place], values: Tensor, tokens: Tensor) -> Tensor:
    """Probabilities [places, candidates] of a request's words, among these, if its target draws as the head does.

    Args:
        values: their logits.
    """
    request = places[0].request
    positions = [len(request.tokens) + place.depth for place in places]
    nothing = Distribution(torch.zeros_like(values), tokens, request.sampler.vocabulary)
    noise = request.sampler.perturbed(nothing, positions)
    # As `together` of scores over the temperature, which might overflow.
    return torch.softmax(values + request.params.temperature * noise, -1)
