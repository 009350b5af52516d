"""Blend: what followed in the text, in earlier answers, and the target's own runners-up, weighed against each other.

Three sources name tokens that may come next, at every node of a tree:

- the request's own text: what followed the longest match of the last tokens (an index as SuffixDecoding's, 2411.04975);
- the tenant's responses, in the same way, where the match is not a short one;
- the target's runners-up where it last read the last two tokens, or else the last one, in verified rows, rejected ones
  included (the idea of Token Recycling, 2408.08696, with one token more of context).

What each says of a token (length of the match, how often it followed, rank) makes its *case*, and how often tokens of a
case were right is measured all the time: for every candidate of every node that the text came by, verified or not. The
tree grows by its likeliest node while there is one above `least`. So a long copy is a chain, doubtful places get
siblings, and estimates are measured probabilities: what a planner (`auto`) needs to cut by cost.

Exactness: lossless (a deterministic tree). What is learnt is a tenant's own, and bounded.
"""

from __future__ import annotations

import heapq
import sys
from bisect import bisect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from hasten.engine import ROOT, Draft, Drafter, Observation, Request, Target, register
from hasten.engine.memory import table_growth
from hasten.errors import require
from hasten.methods.drafters.runners_up import groups_of, largest
from hasten.methods.drafters.suffix_index import NOWHERE, SuffixIndex
from hasten.methods.drafters.suffix_index import ROOT as NO_MATCH
from hasten.methods.drafters.suffix_store import ResponseStore
from hasten.methods.drafters.suffix_texts import Texts

DEPTH = 16
"""Tokens of a match at most: longer ones are as sure."""
LEAST_RESPONSE = 4
"""Tokens that responses must agree on: what they say of fewer the runners-up know better."""
BRANCHES = 3
"""Tokens that a text names at a node, the most frequent."""
LENGTHS = (0, 1, 2, 3, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7)
"""Class of a match by its tokens."""
RUNNERS_UP = 4
"""Tokens remembered of a row."""
LEADS = 0.3, 1.0, 2.0, 4.0
"""Limits between the classes of how far the likeliest token is ahead, in logits."""
# A case is a number: what the own text says, the responses, and the row; 0 of a source that says nothing.
RESPONSES, ROWS = 1 << 8, 1 << 16
"""What a response's and a row's part of a case counts."""
PAIR, UNNAMED = 1 << 6, 1 << 7
"""In a row's part: it is of the last two tokens; it does not name this token."""
MATCHED = (0.0, 0.12, 0.4, 0.6, 0.65, 0.8, 0.9, 0.97), (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
"""Where cases start: of a token that always followed, by the class of the match, in the own text and in responses.
These and the next are about what was measured on prose and tasks."""
LIKELIEST = 0.25, 0.25, 0.35, 0.4, 0.4
"""The same of a row's likeliest token behind a pair, by the class of its lead over the next."""
RUNNING_UP = 0.18, 0.11, 0.04, 0.02, 0.02
"""The same of another one, by the class of the likeliest one's lead over it."""
BEHIND_ONE = 0.6
"""Of these, where the row is of the last token only."""
DOUBTED = 0.5
"""Of what a text says, where the row does not name the token."""
PRIOR = 4.0
"""Observations that the start is worth."""
MEMORY = 200.0
"""Observations of a case after which old ones fade."""
MOST = 0.98
"""Probability of all candidates at a node together, at most."""
TENANTS = 16
"""Tenants whose runners-up and cases are kept, the latest seen."""
ENTRIES = 16_384
"""Contexts of a tenant whose runners-up are kept, the latest met."""
ENTRY_BYTES = 640
"""A context and its row, as CPython stores them."""
CASE_BYTES = 256
"""A case and its record."""


@dataclass(frozen=True)
class BlendParameters:
    """Parameters of the drafter.

    Attributes:
        nodes: bound on the nodes of a draft.
        least: probability of a path below which it is not drafted.
        max_requests: responses remembered, over all tenants; the oldest are forgotten. 0: only the request's own text.
        max_tokens: tokens of all these responses, as well; each takes about 110 bytes.

    Raises:
        UserError: out of range.
    """

    nodes: int = 16
    least: float = 0.12
    max_requests: int = 1_000
    max_tokens: int = 200_000

    def __post_init__(self) -> None:
        checks = (
            (1 <= self.nodes <= 128, "nodes must be between 1 and 128"),
            (0.01 <= self.least < 1, "least must be at least 0.01 and below 1"),
            (self.max_requests >= 0, "max_requests must not be negative"),
            (self.max_tokens >= 1, "max_tokens must be at least 1"),
        )
        require(checks, "blend")


def start_of(case: int) -> float:
    """Where a case starts: at least one of the sources is right, if they know nothing of each other."""
    wrong, row = 1.0, case // ROWS
    trust = DOUBTED if row & UNNAMED else 1.0
    for matched, said in zip(MATCHED, (case % RESPONSES, case // RESPONSES % RESPONSES), strict=True):
        wrong *= 1 - trust * matched[said >> 4] * (1 + (said >> 2 & 3)) / 4
    if row and not row & UNNAMED:
        start = LIKELIEST if row >> 3 & 7 == 1 else RUNNING_UP
        wrong *= 1 - start[row & 7] * (1.0 if row & PAIR else BEHIND_ONE)
    return min(max(1 - wrong, 0.01), 0.97)


class Case:
    """How often tokens of a case were right."""

    __slots__ = ("right", "tried")

    def __init__(self, start: float) -> None:
        self.tried, self.right = PRIOR, PRIOR * start

    def learn(self, right: bool) -> None:
        self.tried += 1.0
        self.right += right
        if self.tried > MEMORY:
            self.tried *= 0.5
            self.right *= 0.5


Row = list[tuple[int, int]]
"""A target's runners-up behind a context, likeliest first, and what the row says of each: rank and class of lead."""


def _row(logits: Sequence[float], tokens: Sequence[int]) -> Row:
    """What a row with these largest logits says."""
    best = logits[0]
    leads = [best - (logits[1] if len(logits) > 1 else -inf), *[best - logit for logit in logits[1:]]]
    return [(tokens[rank], ROWS * (8 * rank + 8 + bisect(LEADS, lead))) for rank, lead in enumerate(leads)]


class _Memory:
    """What is remembered of one tenant's texts, beside its responses."""

    def __init__(self) -> None:
        self.cases: dict[int, Case] = {}
        self._rows: OrderedDict[tuple[int, ...], Row] = OrderedDict()

    @property
    def bytes(self) -> int:
        tables = sys.getsizeof(self._rows) + sys.getsizeof(self.cases)
        return tables + ENTRY_BYTES * len(self._rows) + CASE_BYTES * len(self.cases)

    def growth_bytes(self, rows: int, cases: int) -> int:
        # A row is kept under two contexts. Links of an ordered dictionary are part of its size.
        entries = 2 * rows * (ENTRY_BYTES + 64) + table_growth(self._rows, 2 * rows)
        return entries + cases * CASE_BYTES + table_growth(self.cases, cases)

    def keep(self, context: tuple[int, int], row: Row) -> None:
        """The target was seen behind two tokens."""
        rows = self._rows
        for key in (context, context[1:]):
            rows[key] = row
            rows.move_to_end(key)
        while len(rows) > ENTRIES:
            rows.popitem(last=False)

    def said_by_row(self, context: tuple[int, int]) -> tuple[dict[int, int], int]:
        """What is known of the tokens behind two tokens, or else behind the last, and of those that are not named."""
        row, order = self._rows.get(context), PAIR * ROWS
        if row is None:
            row, order = self._rows.get(context[1:]), 0
        return ({}, 0) if row is None else ({token: sign + order for token, sign in row}, UNNAMED * ROWS + order)


_Match = tuple[int, int]
"""State and length of the longest match in a text."""
_Place = tuple[tuple[int, int], _Match, _Match]
"""Where a node stands: its last two tokens, and its matches in the own text and in the responses."""


class _Tree:
    """A draft as it grows, and what was said at each of its nodes.

    Args:
        own, responses: the texts.
        memory: of the tenant.
        tokens: of the request.
    """

    def __init__(self, own: SuffixIndex, responses: SuffixIndex | None, memory: _Memory, tokens: Sequence[int]) -> None:
        self.start = len(tokens)
        self.draft = Draft()
        self._own, self._responses, self._memory = own, responses, memory
        # Per node and token, its case; and who stands where.
        self._said: dict[int, dict[int, Case]] = {}
        self._nodes: dict[tuple[int, int], int] = {}

    def grow(self, tokens: Sequence[int], nodes: int, least: float) -> None:
        """Take the likeliest node as long as there is one."""
        last = tokens[-DEPTH + 1 :]
        matched = (NO_MATCH, 0)
        if self._responses is not None:
            matched = self._responses.longest(last)
            if matched[1] < LEAST_RESPONSE:
                self._responses = None
        place = (last[-2] if len(last) > 1 else NOWHERE, last[-1]), self._own.longest(last), matched
        draft, reached, node = self.draft, 1.0, ROOT
        queue: list[tuple[float, int, int, int, _Place]] = []
        while True:
            said = self._said[node] = self._ask(place)
            odds = [case.right / case.tried for case in said.values()]
            # Siblings exclude each other, however sure their sources are.
            share = reached * min(1.0, MOST / (sum(odds) or 1.0))
            for token, odd in zip(said, odds, strict=True):
                if share * odd >= least:
                    heapq.heappush(queue, (-share * odd, len(draft), token, node, place))
            if not queue or len(draft) >= nodes:
                return
            negative, _, token, parent, above = heapq.heappop(queue)
            node, reached, place = len(draft), -negative, self._below(above, token)
            self._nodes[parent, token] = node
            draft.tokens.append(token)
            draft.parents.append(parent)
            draft.estimates.append(reached)

    def _below(self, above: _Place, token: int) -> _Place:
        (_, last), own, matched = above
        if self._responses is not None:
            matched = self._responses.onward(*matched, token)
        return (last, token), self._own.onward(*own, token), matched

    def _ask(self, place: _Place) -> dict[int, Case]:
        """What may come next, and the case of each."""
        said, unnamed = self._memory.said_by_row(place[0])
        for token, sign in _followers(self._own, *place[1], 1):
            said[token] = said.get(token, unnamed) + sign
        if self._responses is not None:
            for token, sign in _followers(self._responses, *place[2], LEAST_RESPONSE):
                said[token] = said.get(token, unnamed) + RESPONSES * sign
        cases = self._memory.cases
        found: dict[int, Case] = {}
        for token, number in said.items():
            case = cases.get(number)
            if case is None:
                case = cases[number] = Case(start_of(number))
            found[token] = case
        return found

    def judge(self, came: Sequence[int]) -> None:
        """Learn which of all that was said on the way was right."""
        node = ROOT
        for token in came:
            for each, case in self._said[node].items():
                case.learn(each == token)
            following = self._nodes.get((node, token))
            if following is None or following not in self._said:
                return
            node = following


def _followers(text: SuffixIndex, state: int, length: int, least: int) -> list[tuple[int, int]]:
    """Tokens that followed the longest part of a match that anything followed, and what the text says of each."""
    while state != NO_MATCH and length >= least:
        following = text.following(state, 1)
        if following:
            total = sum([count for count, _, _ in following])
            if len(following) > BRANCHES:
                following = sorted(following, key=_count, reverse=True)[:BRANCHES]
            class_ = LENGTHS[min(length, DEPTH)] * 16 + min(total, 3)
            return [(token, class_ + 4 * min(3, 4 * count // total)) for count, token, _ in following if token >= 0]
        state, length = text.shorter(state)
    return []


def _count(follower: tuple[int, int, int]) -> int:
    return follower[0]


@register(
    "blend",
    family="drafters",
    exactness="lossless",
    paper="",
    title="Text, answers and runners-up, weighed by measured rates",
    parameters=BlendParameters,
)
class Blend(Drafter):
    """What is learnt of a tenant's texts serves all its requests."""

    def __init__(self, target: Target, parameters: BlendParameters) -> None:
        self.parameters = parameters
        store = None
        if parameters.max_requests:
            store = ResponseStore((parameters.max_requests, parameters.max_tokens), DEPTH, None, target)
        self._texts = Texts(DEPTH, store)
        self._runners_up = min(RUNNERS_UP, target.model.config.vocab_size)
        # Of one tree, at all its nodes and the root.
        self._candidates = (parameters.nodes + 1) * (RUNNERS_UP + 2 * BRANCHES)
        self._empty = _Memory()
        self._memories: OrderedDict[str, _Memory] = OrderedDict()
        self._trees: dict[int, _Tree] = {}

    @property
    def memory_bytes(self) -> int:
        return self._texts.memory_bytes + sum(memory.bytes for memory in self._memories.values())

    def growth_bytes(self, requests: Sequence[Request], rows: int = 0) -> int:
        tenants = {request.params.tenant for request in requests}
        grown = self._texts.growth_bytes(requests)
        for tenant in tenants:
            memory = self._memories.get(tenant)
            grown += 0 if memory is not None else self._empty.bytes
            grown += (memory or self._empty).growth_bytes(rows, len(requests) * self._candidates)
        return grown

    def scratch_bytes(self, requests: Sequence[Request], nodes: int) -> int:
        # Of one request's rows at a time: the maxima of groups, those groups, and what is found. And all trees.
        vocabulary = max(request.sampler.vocabulary for request in requests)
        groups, group = groups_of(vocabulary, self._runners_up)
        rows = (nodes + 1) * (4 * groups + self._runners_up * (4 * group + 64))
        return rows + len(requests) * self._candidates * 128

    def propose(self, request: Request, budget: int) -> Draft:
        text, memory = self._texts.read(request), self._memory(request)
        tree = _Tree(text.index, self._texts.responses(request), memory, request.tokens)
        self._trees[request.id] = tree
        tree.grow(request.tokens, min(self.parameters.nodes, budget), self.parameters.least)
        return tree.draft

    def observe(self, request: Request, seen: Observation) -> None:
        """Judge what was said by the tokens that came, and keep all rows, whoever drafted them."""
        tree, before = self._trees.pop(request.id, None), len(request.tokens) - len(seen.tokens)
        # One that was not judged in its step, since nobody showed that, says nothing of a later one.
        if tree is not None and tree.start == before:
            tree.judge(seen.tokens)
        memory, draft = self._memory(request), seen.draft
        contexts = {ROOT: (request.tokens[before - 2] if before > 1 else NOWHERE, request.tokens[before - 1])}
        for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
            contexts[node] = (contexts[parent][1], token)
        values, ids = largest(seen.logits, self._runners_up)
        for context, logits, tokens in zip(contexts.values(), values.tolist(), ids.tolist(), strict=True):
            memory.keep(context, _row(logits, tokens))

    def end(self, request: Request) -> None:
        self._trees.pop(request.id, None)
        self._texts.end(request)

    def _memory(self, request: Request) -> _Memory:
        tenant = request.params.tenant
        memory = self._memories.get(tenant)
        if memory is None:
            memory = self._memories[tenant] = _Memory()
            if len(self._memories) > TENANTS:
                self._memories.popitem(last=False)
        self._memories.move_to_end(tenant)
        return memory
