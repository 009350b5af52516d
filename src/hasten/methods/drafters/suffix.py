"""SuffixDecoding: what followed the last tokens before, counted over the request and over earlier responses.

"SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications", 2411.04975. No model, no training.
Exactness: lossless (a deterministic chain or tree).

Two kinds of text are counted: the request's own (prompt and output), and the responses of earlier and of running
requests of the same tenant; prompts never enter the latter. For every length m at which the context's suffix w occurs,
a draft is grown from what follows it: a token x has probability count(wx) / count(w), a path the product. A draft has
at most `factor * m + offset` nodes, does not reach beyond `depth` tokens of match and draft together, and takes no path
below `min_probability`. The sum of its probabilities is its score, the expected number of accepted tokens. The highest
score wins; among equals the longer match, and the request's own text. So a long match brings a long draft, and a
doubtful one a short draft or none.

count(w) takes every occurrence, also at the very end of a text, and so the one that is being continued: what was seen
once before has probability 1/2 in the request's own text. (Dividing by the counts of what followed, as the paper is
quoted, would give 1. This is how the authors' code counts, and what the defaults are meant for.) Among next tokens of
equal count the one that came first is taken.

With a drafter model behind it (`suffix:minimum_score=2+draft-model`), drafts of a lower score are left to that one. The
authors' code sets the score to the model's draft length, the paper to its mean number of accepted tokens.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hasten.engine import ROOT, Draft, Drafter, Observation, Request, Target, register
from hasten.errors import require
from hasten.methods.drafters.suffix_index import SuffixIndex
from hasten.methods.drafters.suffix_store import ResponseStore
from hasten.methods.drafters.suffix_texts import Texts


@dataclass(frozen=True)
class SuffixParameters:
    """Parameters of the drafter.

    Attributes:
        depth: bound on the tokens of match and draft together.
        length: bound on the nodes of a draft.
        factor, offset: a match of m tokens allows `factor * m + offset` nodes.
        min_probability: least probability of a drafted path.
        minimum_score: drafts that promise fewer accepted tokens are not made.
        tree: draft the likeliest nodes of all paths instead of the likeliest token after each.
        max_requests: responses remembered, over all tenants; the oldest are forgotten. 0: only the request's own text.
        max_tokens: tokens of all these responses, as well; each takes about 110 bytes.
        store: file that keeps the responses; made if it does not exist.

    Raises:
        UserError: out of range.
    """

    depth: int = 64
    length: int = 16
    factor: float = 1.0
    offset: float = 0.0
    min_probability: float = 0.1
    minimum_score: float = 0.0
    tree: bool = False
    max_requests: int = 10_000
    max_tokens: int = 2_000_000
    store: str = ""

    def __post_init__(self) -> None:
        checks = (
            (2 <= self.depth <= 1024, "depth must be between 2 and 1024"),
            (1 <= self.length <= 128, "length must be between 1 and 128"),
            (0 <= self.factor <= 128, "factor must be between 0 and 128"),
            (-128 <= self.offset <= 128, "offset must be between -128 and 128"),
            (0 <= self.min_probability <= 1, "min_probability must be between 0 and 1"),
            (0 <= self.minimum_score <= 128, "minimum_score must be between 0 and 128"),
            (self.max_requests >= 0, "max_requests must not be negative"),
            (self.max_tokens >= 1, "max_tokens must be at least 1"),
            (self.max_requests > 0 or not self.store, "a store needs max_requests above 0"),
        )
        require(checks, "suffix")


@dataclass(frozen=True)
class Speculation:
    """A draft and its score: the sum of its nodes' probabilities."""

    draft: Draft
    score: float


NOTHING = Speculation(Draft(), 0.0)


class Speculator:
    """Grows the draft of the highest score for a context from the counts of an index."""

    def __init__(self, parameters: SuffixParameters) -> None:
        self.parameters = parameters
        depth = parameters.depth
        # Nodes that a match of m tokens allows. The authors add 1e-6, so that rounding in factor * m loses none.
        rooms = [math.floor(parameters.factor * m + parameters.offset + 1e-6) for m in range(depth)]
        self._rooms = [max(0, min(parameters.length, room)) for room in rooms]
        # A chain ends where the depth does, so its room grows with the match up to a peak, and shrinks behind it.
        self._chain_rooms = [min(room, depth - m) for m, room in enumerate(self._rooms)]
        self._peak = self._chain_rooms.index(max(self._chain_rooms))
        # A tree is not bound by the depth up to this match.
        self._unbound = max((m for m, room in enumerate(self._rooms) if room <= depth - m), default=0)

    def __call__(self, index: SuffixIndex, context: Sequence[int], budget: int, best: Speculation) -> Speculation:
        """The best draft, if its score is above that of `best`; else `best`.

        Args:
            index: what to look up.
            context: the text's last tokens, as many as may match: at most depth - 1.
            budget: at most so many nodes.
            best: what there is already.
        """
        grow = self._tree if self.parameters.tree else self._chain
        for state, longest, shortest in index.matches(context):
            # A probability is at most 1, so this match and shorter ones score at most what they have room for.
            if best.score >= min(self._rooms[longest], budget):
                break
            grown = grow(index, state, longest, shortest, budget, best.score)
            if grown is not None and grown.score > best.score:
                best = grown
        return best

    def _least(self, whole: int) -> int:
        """The count from which a path is likely enough; `whole` is that of its start."""
        # In floating point 0.07 * 100 is more than 7; the factor lets 7 of 100 count as 0.07.
        return max(1, math.ceil(self.parameters.min_probability * whole * (1 - 1e-12)))

    def _chain(
        self, index: SuffixIndex, state: int, longest: int, shortest: int, budget: int, bar: float
    ) -> Speculation | None:
        """The likeliest token after each, from the best of the match lengths; None if no score above the bar.

        Probabilities telescope: that of a path is the count of its end over the count of its start.
        """
        nodes = min(self._chain_rooms[max(shortest, min(longest, self._peak))], budget)
        whole = index.count(state)
        least = self._least(whole)
        tokens: list[int] = []
        counts: list[int] = []
        total = 0
        while len(tokens) < nodes:
            likeliest = index.likeliest(state)
            if likeliest is None or likeliest[0] < least:
                break
            count, token, state = likeliest
            if total + count * (nodes - len(tokens)) <= bar * whole:
                return None
            tokens.append(token)
            counts.append(count)
            total += count
        return Speculation(Draft.chain(tokens, [count / whole for count in counts]), total / whole)

    def _tree(
        self, index: SuffixIndex, state: int, longest: int, shortest: int, budget: int, bar: float
    ) -> Speculation | None:
        """The likeliest nodes, from the best of the match lengths (the longer among equals); None as in `_chain`."""
        best: _Tree | None = None
        tried = -1
        for match in range(max(shortest, min(longest, self._unbound)), longest + 1):
            nodes, levels = min(self._rooms[match], budget), self.parameters.depth - match
            # As many nodes on fewer levels score as much at most.
            if nodes == tried and (best is None or not best.has_equal(levels)):
                continue
            tried = nodes
            grown = _Tree(index, state, nodes, levels, self._least(index.count(state)))
            if grown.grow(bar * grown.whole) and (best is None or grown.total >= best.total):
                best = grown
        return None if best is None else best.speculation()


class _Tree:
    """Nodes below a state, the likeliest first and so parents before children; among equals, those that came first.

    Args:
        nodes, levels: how many there may be.
        least: count of a node.
    """

    def __init__(self, index: SuffixIndex, state: int, nodes: int, levels: int, least: int) -> None:
        self.index, self.nodes, self.levels, self.least = index, nodes, levels, least
        self.whole = index.count(state)
        self.total = 0
        self.draft = Draft()
        self._counts: list[int] = []
        self._depths: list[int] = []
        # What may come next: (-count, serial number, token, state, parent, level).
        self._queue: list[tuple[int, int, int, int, int, int]] = []
        self._serial = 0
        self._push(state, ROOT, 1)

    def _push(self, state: int, parent: int, level: int) -> None:
        for count, token, child in self.index.following(state, self.least):
            heapq.heappush(self._queue, (-count, self._serial, token, child, parent, level))
            self._serial += 1

    def grow(self, bar: float) -> bool:
        """Take nodes while there are any; False as soon as their counts cannot add up to more than the bar."""
        while self._queue and len(self.draft) < self.nodes:
            negative, _, token, state, parent, level = heapq.heappop(self._queue)
            if self.total - negative * (self.nodes - len(self.draft)) <= bar:
                return False
            if level < self.levels:
                self._push(state, len(self.draft), level + 1)
            self.draft.tokens.append(token)
            self.draft.parents.append(parent)
            self._counts.append(-negative)
            self._depths.append(level)
            self.total -= negative
        return bool(self._counts)

    def has_equal(self, levels: int) -> bool:
        """Whether another tree, of as many nodes but on so few levels, may score the same."""
        deeper = next((count for count, depth in zip(self._counts, self._depths, strict=True) if depth > levels), None)
        # Nodes too deep would be replaced, and what is left is no better than the last that was taken.
        return bool(self._queue) and deeper == self._counts[-1] == -self._queue[0][0]

    def speculation(self) -> Speculation:
        self.draft.estimates = [count / self.whole for count in self._counts]
        return Speculation(self.draft, self.total / self.whole)


@register(
    "suffix",
    aliases=("suffix-decoding",),
    family="drafters",
    exactness="lossless",
    paper="2411.04975",
    title="SuffixDecoding: go on as this and earlier texts did",
    parameters=SuffixParameters,
)
class Suffix(Drafter):
    """An index per request, and a store of responses for all."""

    def __init__(self, target: Target, parameters: SuffixParameters) -> None:
        self.parameters = parameters
        self.store: ResponseStore | None = None
        if parameters.max_requests:
            path = Path(parameters.store) if parameters.store else None
            limits = (parameters.max_requests, parameters.max_tokens)
            self.store = ResponseStore(limits, parameters.depth, path, target)
        self._texts = Texts(parameters.depth, self.store)
        self._speculate = Speculator(parameters)

    @property
    def memory_bytes(self) -> int:
        return self._texts.memory_bytes

    def growth_bytes(self, requests: Sequence[Request], rows: int = 0) -> int:
        return self._texts.growth_bytes(requests)

    def propose(self, request: Request, budget: int) -> Draft:
        text = self._texts.read(request)
        matching = min(self.parameters.depth, len(request.tokens)) - 1
        if matching < 1:
            return Draft()
        context = request.tokens[-matching:]
        best = self._speculate(text.index, context, budget, NOTHING)
        shared = self._texts.responses(request)
        if shared is not None:
            best = self._speculate(shared, context, budget, best)
        return best.draft if best is not NOTHING and best.score >= self.parameters.minimum_score else Draft()

    def observe(self, request: Request, seen: Observation) -> None:
        self._texts.read(request)

    def end(self, request: Request) -> None:
        self._texts.end(request)
