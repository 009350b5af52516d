"""STAND: n-grams remember the target's probabilities of what came next; drafts are sampled from them.

"Accelerated Test-Time Scaling with Model-Free Speculative Sampling" 2025, arXiv 2506.04708. No model. Reasoning models
are sampled many times per question and repeat their phrases. For each context of 4, 3 and 2 tokens the table holds the
ten likeliest next tokens with their probabilities, averaged over all times that the context was met; a draft is
*sampled* from them, children without replacement (Gumbel top-k), in a static tree whose shape was learned from which
nodes are accepted. A sampled child is accepted more often than a looked-up one: the sum of min(p, q), not p(child).

Exactness: lossless. With the default acceptance the noise is the request's own, so a child is the token that the target
will draw wherever table and target agree; with `acceptance="max"` the children come from the request's coins and carry
q (rejection without replacement). Greedy requests, `acceptance="typical"` and `sampled=false` take the likeliest.

The paper leaves open, or is not known to say, and here it is so:
- Keys are contexts of n tokens, without the next one; the longest that was met `hits` times is used.
- Stored probabilities are those of the raw logits at temperature 1; temperature, logit bias, top-k, top-p and min-p of
  the request are applied when drafting, to the stored tokens only, so that requests of all kinds share one table.
  Penalties are not applied.
- The root's and the accepted nodes' distributions are stored; those of rejected nodes, too, with `rejected=true`. Of a
  prompt only the last position is: the others' logits are not computed.
- Noise is never used twice: it belongs to a token at a position, or to a node.
- The table is shared by all requests of a tenant and bounded; the n-gram not met for longest gives way. With
  `acceptance="max"` the text depends on the draft, and so on what the table has met; `shared=false` rules that out.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice
from math import exp, inf, log
from operator import itemgetter
from pathlib import Path

import torch

from hasten.engine import ROOT, Draft, Drafter, Engine, Observation, Request, SamplingParams, Target, register
from hasten.engine.memory import logits_bytes
from hasten.engine.sampling.noise import Uniforms
from hasten.errors import UserError, require
from hasten.methods.drafters.drawing import order_of_noise, sampled
from hasten.model.ranking import rank

DRAFT_PURPOSE = 5
"""Coins of the drafter are another stream than the verifier's."""

_Key = tuple[str | int, ...]

Tree = tuple[str, ...]
"""A node is a word of digits, one per level: its ancestors' and its own rank among siblings, in draw order. Parents and
elder siblings come first, so that any first part of a tree is a tree."""

NODES = 32
"""Of a tree, unless told otherwise."""
_WORDS = """
0 00 000 1 0000 00000 10 2 01 000000 3 0000000 100 00000000 010 20 1000 001 30 0100 11
01000 200 2000 10000 300 0010 010000 0100000 101 00100 100000 31 110 3000 21 1000000 001000 10000000 011
"""
TREE: Tree = tuple(_WORDS.split())
"""Most useful first, as `calibrate` found it for the model that ships, at temperature 0.6."""


@dataclass(frozen=True)
class StandParameters:
    """Parameters of the drafter.

    Attributes:
        maximum, minimum: tokens of the contexts that are keys.
        hits: a context must have been met so often to be used.
        top: next tokens stored per context.
        nodes: the first so many of the static tree; 0 is 32, or all of a smaller one.
        tree: a file of the words of a `Tree`, such as `calibrate` gives; empty for the built-in one.
        sampled: draw the children; otherwise take the likeliest.
        rejected: learn from rejected nodes, too.
        floor: next tokens of less probability are neither stored nor drafted.
        shared: a tenant's requests learn from each other; else each one from itself alone.
        entries: contexts held, over all tenants.

    Raises:
        UserError: out of range.
    """

    maximum: int = 4
    minimum: int = 2
    hits: int = 1
    top: int = 10
    nodes: int = 0
    tree: str = ""
    sampled: bool = True
    rejected: bool = False
    floor: float = 0.001
    shared: bool = True
    entries: int = 100_000

    def __post_init__(self) -> None:
        checks = (
            (1 <= self.minimum <= self.maximum <= 16, "1 <= minimum <= maximum <= 16 must hold"),
            (self.hits >= 1, "hits must be at least 1"),
            (1 <= self.top <= 256, "top must be between 1 and 256"),
            (self.nodes >= 0, "nodes must not be negative"),
            (0 < self.floor < 1, "floor must be between 0 and 1"),
            (self.entries >= 1, "entries must be at least 1"),
        )
        require(checks, "stand")


@dataclass(frozen=True, slots=True)
class Entry:
    """What followed a context: tokens, likeliest first, their mean probabilities, and how often it was met."""

    ids: tuple[int, ...]
    probabilities: tuple[float, ...]
    hits: int = 1

    def met_again(self, other: Entry, top: int, floor: float) -> Entry:
        """The running mean with one more meeting: the `top` likeliest of both."""
        share = 1 / (self.hits + 1)
        mean = {token: p * (1 - share) for token, p in zip(self.ids, self.probabilities, strict=True)}
        for token, p in zip(other.ids, other.probabilities, strict=True):
            mean[token] = mean.get(token, 0.0) + p * share
        best = sorted(mean.items(), key=itemgetter(1), reverse=True)[:top]
        kept = [item for item in best if item[1] >= floor]
        return Entry(tuple(token for token, _ in kept), tuple(p for _, p in kept), self.hits + 1)

    def processed(self, params: SamplingParams, floor: float) -> tuple[list[int], list[float]]:
        """Tokens and probabilities as a request samples, renormalised over what is left, likeliest first."""
        ids, scores = list(self.ids), [log(p) for p in self.probabilities]
        if params.logit_bias:
            biased = [score + params.logit_bias.get(token, 0.0) for token, score in zip(ids, scores, strict=True)]
            order = sorted(range(len(ids)), key=biased.__getitem__, reverse=True)
            ids, scores = [ids[i] for i in order], [biased[i] for i in order]
        if not ids or scores[0] == -inf:
            return [], []
        temperature = 1.0 if params.greedy else params.temperature
        weights = [exp((score - scores[0]) / temperature) for score in scores]
        kept = min(params.top_k or len(ids), len(ids))
        if params.top_p < 1:
            left = params.top_p * sum(weights[:kept])
            for index in range(kept):
                if left <= 0:
                    kept = index
                    break
                left -= weights[index]
        # The likeliest has weight 1.
        least = max(params.min_p, floor * sum(weights[:kept]))
        while kept > 1 and weights[kept - 1] < least:
            kept -= 1
        total = sum(weights[:kept])
        return ids[:kept], [weight / total for weight in weights[:kept]]


@register(
    "stand",
    family="drafters",
    exactness="lossless",
    paper="2506.04708",
    title="STAND: n-grams' stored probabilities, drawn as a tree",
    parameters=StandParameters,
)
class Stand(Drafter):
    """One table for all requests; keys begin with the owner, a tenant or a request.

    Raises:
        UserError: a tree that cannot be read, or has fewer nodes than are wanted.
    """

    def __init__(self, target: Target, parameters: StandParameters) -> None:
        self.parameters = parameters
        self._table: OrderedDict[_Key, Entry] = OrderedDict()
        tree = load_tree(parameters.tree) if parameters.tree else TREE
        if parameters.nodes > len(tree):
            raise UserError(f"stand: nodes must be at most {len(tree)}, which its tree has")
        self._plant(tree[: parameters.nodes or NODES])

    def _plant(self, tree: Tree) -> None:
        slots = {"": ROOT} | {path: slot for slot, path in enumerate(tree)}
        self._parents = [slots[path[:-1]] for path in tree]
        self._widths = Counter(self._parents)

    @property
    def memory_bytes(self) -> int:
        """As CPython stores it: about 500 bytes per context, and 64 per token that may follow."""
        return sum(500 + 64 * len(entry.ids) for entry in self._table.values())

    def growth_bytes(self, requests: Sequence[Request], rows: int = 0) -> int:
        sizes = self.parameters.maximum - self.parameters.minimum + 1
        return len(requests) * rows * sizes * (500 + 64 * self.parameters.top)

    def scratch_bytes(self, requests: Sequence[Request], nodes: int) -> int:
        # The rows that are learnt of are copied, one request's after the other's.
        top = self.parameters.top
        return max(logits_bytes(nodes + 1, request.sampler.vocabulary) for request in requests) + (nodes + 1) * top * 32

    def end(self, request: Request) -> None:
        if not self.parameters.shared:
            for key in [key for key in self._table if key[0] == request.id]:
                del self._table[key]

    def _owner(self, request: Request) -> str | int:
        """Whose entries a request reads and writes: its tenant's, or its own."""
        return request.params.tenant if self.parameters.shared else request.id

    # Drafting

    def propose(self, request: Request, budget: int) -> Draft:
        longest, root = self.parameters.maximum, len(request.tokens)
        coins = request.sampler.coins(root, DRAFT_PURPOSE)
        draft = Draft()
        # Per filled slot of the tree: node, the context that ends with it, its child's position, its estimate.
        filled = {ROOT: (ROOT, tuple(request.tokens[-longest:]), root, 1.0)}
        offers: dict[int, Iterator[tuple[int, float]]] = {}
        for slot, parent in enumerate(self._parents[:budget]):
            if parent not in filled:
                continue
            node, context, position, estimate = filled[parent]
            if parent not in offers:
                width = self._widths[parent]
                offers[parent] = iter(self._children(request, context, position, width, draft, node, coins))
            token, share = next(offers[parent], (None, 0.0))
            if token is None:
                continue
            filled[slot] = (len(draft.tokens), (*context, token)[-longest:], position + 1, estimate * share)
            draft.tokens.append(token)
            draft.parents.append(node)
            draft.estimates.append(estimate * share)
        return draft

    def _children(
        self,
        request: Request,
        context: tuple[int, ...],
        position: int,
        width: int,
        draft: Draft,
        node: int,
        coins: Uniforms,
    ) -> list[tuple[int, float]]:
        """At most `width` children of a node, in draw order, and an estimate of each one's acceptance.

        With probability hits / (hits + 1) the table is taken to be right: then table and target draw the same first
        child. Otherwise they draw apart, and a child is accepted with its probability.
        """
        params = request.params
        entry = self._lookup(self._owner(request), context)
        ids, q = entry.processed(params, self.parameters.floor) if entry is not None else ([], [])
        if entry is None or not ids:
            return []
        right = entry.hits / (entry.hits + 1)
        order: Sequence[int] = range(min(width, len(ids)))
        if not params.greedy:
            if not self.parameters.sampled or params.acceptance == "typical":
                right = 0.0
            elif params.acceptance == "match":
                order = order_of_noise(request.sampler, position, ids, q, width)
            else:
                children = sampled(draft, node, torch.tensor(q, dtype=torch.float64), torch.tensor(ids), coins)
                order = [ids.index(token) for token, _ in islice(children, min(width, len(ids)))]
        return [(ids[i], (1 - right) * q[i] + (0.0 if rank else right)) for rank, i in enumerate(order)]

    def _lookup(self, owner: str | int, context: tuple[int, ...]) -> Entry | None:
        """What is known of the longest end of a context."""
        for size in range(min(self.parameters.maximum, len(context)), self.parameters.minimum - 1, -1):
            entry = self._table.get((owner, *context[-size:]))
            if entry is not None and entry.hits >= self.parameters.hits:
                return entry
        return None

    # Learning

    def observe(self, request: Request, seen: Observation) -> None:
        longest, draft, owner = self.parameters.maximum, seen.draft, self._owner(request)
        before = len(request.tokens) - len(seen.tokens)
        contexts = {ROOT: tuple(request.tokens[max(0, before - longest) : before])}
        for node in range(len(draft)) if self.parameters.rejected else seen.path:
            contexts[node] = (*contexts[draft.parents[node]], draft.tokens[node])[-longest:]
        logits = seen.logits[torch.tensor([node + 1 for node in contexts], device=seen.logits.device)]
        values, ids, masses = rank(logits, self.parameters.top)
        probabilities = (values - masses.unsqueeze(-1)).exp()
        for context, row_ids, row in zip(contexts.values(), ids.tolist(), probabilities.tolist(), strict=True):
            kept = sum(p >= self.parameters.floor for p in row)
            self._learn(owner, context, Entry(tuple(row_ids[:kept]), tuple(row[:kept])))

    def _learn(self, owner: str | int, context: tuple[int, ...], new: Entry) -> None:
        """One more meeting of the n-grams that end a context."""
        table, parameters = self._table, self.parameters
        for size in range(parameters.minimum, min(parameters.maximum, len(context)) + 1):
            key: _Key = (owner, *context[-size:])
            old = table.get(key)
            table[key] = new if old is None else old.met_again(new, parameters.top, parameters.floor)
            if old is not None:
                table.move_to_end(key)
            elif len(table) > parameters.entries:
                table.popitem(last=False)


# The tree


def load_tree(path: str | Path) -> Tree:
    """Read the words of a tree.

    Raises:
        UserError: no such file, no tree.
    """
    try:
        words = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"stand: cannot read the tree {path}: {error}") from error
    known = {""}
    for word in words:
        elder = word[:-1] + str(int(word[-1]) - 1) if word.isdecimal() and word[-1] != "0" else word[:-1]
        if not (word.isascii() and word.isdecimal()) or word in known or {word[:-1], elder} - known:
            raise UserError(f"stand: {path} is no tree: {word!r} is not a node below and beside those before it")
        known.add(word)
    if not words:
        raise UserError(f"stand: the tree {path} is empty")
    return tuple(words)


def full_tree(widths: Sequence[int]) -> Tree:
    """Every node at level i has `widths[i]` children, at most 10."""
    tree: list[str] = []
    level = [""]
    for width in widths:
        level = [path + str(rank) for path in level for rank in range(width)]
        tree += level
    return tuple(tree)


def calibrate(
    engine: Engine,
    prompts: Iterable[Sequence[int]],
    params: SamplingParams,
    nodes: int = 32,
    parameters: StandParameters | None = None,
    widths: Sequence[int] = (4, 2, 2, 1, 1, 1, 1, 1),
) -> Tree:
    """Decode prompts with a large tree, and keep the nodes that are accepted most often.

    Args:
        engine: of the model to draft for; decodes the prompts one after another.
        prompts: token ids. A thousand or two of generated tokens are enough for 32 nodes.
        params: as the tree will be used; several choices per prompt.
        nodes: of the tree that is returned.
        parameters: of the drafter; its own tree is ignored.
        widths: of the large tree (`full_tree`); an engine verifies at most 128 nodes.
    """
    large = full_tree(widths)
    drafter = _Counting(engine.target, parameters or StandParameters(), large)
    for prompt in prompts:
        engine.add(prompt, params, drafter)
        for _ in engine.run():
            pass
    return ranked(drafter.accepted, large, nodes)


def ranked(accepted: Mapping[str, int], tree: Tree, nodes: int) -> Tree:
    """The nodes of a tree that were accepted most often, most often first; parents and elder siblings before others."""
    places = {path: place for place, path in enumerate(tree)}
    waiting = [(-accepted.get("0", 0), 0, "0")]
    chosen: list[str] = []
    while waiting and len(chosen) < nodes:
        path = heappop(waiting)[2]
        chosen.append(path)
        younger = [path[:-1] + str(int(path[-1]) + 1)] if path[-1] != "9" else []
        for freed in [path + "0", *younger]:
            if freed in places:
                heappush(waiting, (-accepted.get(freed, 0), places[freed], freed))
    return tuple(chosen)


class _Counting(Stand):
    """Counts how often each node of its tree is accepted."""

    def __init__(self, target: Target, parameters: StandParameters, tree: Tree) -> None:
        super().__init__(target, parameters)
        self._plant(tree)
        self.accepted: Counter[str] = Counter()

    def observe(self, request: Request, seen: Observation) -> None:
        below = seen.draft.children()
        path = ""
        for node in seen.path:
            path += str(below[seen.draft.parents[node]].index(node))
            self.accepted[path] += 1
        super().observe(request, seen)
