"""ADED: a table of tri-grams that adapts to what is generated, searched for the likeliest continuations.

Liu et al. 2024, "Adaptive Draft-Verification for Efficient Large Language Model Decoding" (AAAI 2025), arXiv
2407.12021; constants are those of the authors' program (Adaptix) where nothing else is said. No model: P(c | a, b) for
the likeliest dozen successors of every bigram, counted in a corpus (`build_table`) or begun empty, and raised a little
for each tri-gram that prompts and answers show. Exactness: lossless; the tree's nodes are deterministic, and one draw
of the target per node decides.

Two searches make the tree. `puct` is the paper's Monte-Carlo tree search. `heap` takes the N likeliest prefixes, best
first: no tree of N nodes has a larger sum of path probabilities, which is the table's own estimate of the tokens
accepted. It is the default: with as many nodes PUCT was measured to give the same tokens per step or up to two per cent
fewer, and it takes more than ten times as long.

What differs from the authors' program, on purpose:
- Sampling draws one token per node; there, shared nodes had several chances and the draw was thrown away on mismatch.
- A tri-gram is counted once, when it appears; there, once for each step that it stayed among the last 16 tokens. The
  default increment is larger for that (there 0.04 each time); trees are deeper (there 4) and smaller (there 64 nodes).
- P is normalised per bigram in the search; there, weights grew past 1 and drowned the values.
- A rollout's value is 1 plus the probabilities along its path; there, a wrong index made it 1 for every path.
- Where the tree is too large, the least probable paths go, not the longest; where nothing is known, nothing is drafted.
- Special tokens may end a draft (end of text does), but nothing is drafted below them.
- The table is bounded: the lightest successor of a bigram and the bigram not seen for longest give way.
- All of a prompt is counted, not its last 16 tokens; of several choices of a prompt, the first one counts it.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import log, sqrt
from operator import neg
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hasten.engine import ROOT, Draft, Drafter, Request, Target, register
from hasten.engine.drafting.draft import MAX_DRAFT
from hasten.errors import UserError, require

TOKEN_BITS = 21
"""Three token ids share a 64-bit integer."""
SEARCH_PURPOSE = 6
"""The coins that seed the rollouts."""


@dataclass(frozen=True)
class AdedParameters:
    """Parameters of the drafter.

    Attributes:
        table: a file that `TrigramTable.save` wrote; empty for none.
        search: `heap` or `puct`.
        nodes: nodes of the draft tree, at most.
        depth: levels of the tree. With `puct` the last level is the likeliest successor of each path.
        successors: kept per bigram.
        increment: added to a tri-gram's weight when it is seen; 0 freezes the table.
        cap: of a weight. A counted table's weights are probabilities, so increment and cap say how fast it forgets.
        shared: a tenant's requests learn from each other; else each one from itself alone.
        bigrams: adapted bigrams held, over all tenants.
        iterations, paths, c1, c2: of `puct`: rollouts, paths kept by visits, and the constants of the rule.

    Raises:
        UserError: out of range.
    """

    table: str = ""
    search: str = "heap"
    nodes: int = 32
    depth: int = 8
    successors: int = 12
    increment: float = 0.2
    cap: float = 3.0
    shared: bool = True
    bigrams: int = 100_000
    iterations: int = 150
    paths: int = 24
    c1: float = 32.0
    c2: float = 8.0

    def __post_init__(self) -> None:
        checks = (
            (self.search in ("heap", "puct"), "search must be heap or puct"),
            (1 <= self.nodes <= MAX_DRAFT, f"nodes must be between 1 and {MAX_DRAFT}"),
            (1 <= self.depth <= 64, "depth must be between 1 and 64"),
            (1 <= self.successors <= 256, "successors must be between 1 and 256"),
            (0 <= self.increment <= self.cap, "0 <= increment <= cap must hold"),
            (self.bigrams >= 1, "bigrams must be at least 1"),
            (1 <= self.iterations <= 10_000, "iterations must be between 1 and 10000"),
            (1 <= self.paths <= 512, "paths must be between 1 and 512"),
            (self.c1 >= 0 and self.c2 > 0, "c1 must not be negative and c2 must be positive"),
        )
        require(checks, "aded")


@dataclass(frozen=True, eq=False)
class TrigramTable:
    """Counted tri-grams as sorted arrays.

    Attributes:
        bigrams: int64 [bigrams], `first << 21 | second`, ascending.
        starts: int64 [bigrams + 1]: bigram i's successors are `starts[i] : starts[i + 1]`.
        tokens: int32 [successors], likeliest first within a bigram.
        weights: float32 [successors], P(token | bigram); what was cut off is missing from a bigram's sum.
    """

    bigrams: NDArray[np.int64]
    starts: NDArray[np.int64]
    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]
    _keys: memoryview = field(init=False)

    def __post_init__(self) -> None:
        # A memoryview gives plain integers, several times faster than an array does.
        object.__setattr__(self, "_keys", np.ascontiguousarray(self.bigrams).data)

    @property
    def memory_bytes(self) -> int:
        return self.bigrams.nbytes + self.starts.nbytes + self.tokens.nbytes + self.weights.nbytes

    def after(self, first: int, second: int) -> tuple[list[int], list[float]]:
        """Successors of a bigram and their weights, heaviest first; empty where it was never counted."""
        key = first << TOKEN_BITS | second
        at = bisect_left(self._keys, key)
        if at == len(self._keys) or self._keys[at] != key:
            return [], []
        here = slice(int(self.starts[at]), int(self.starts[at + 1]))
        return self.tokens[here].tolist(), self.weights[here].tolist()

    def save(self, path: str | Path) -> None:
        """Write a safetensors file.

        Raises:
            UserError: the file cannot be written.
        """
        arrays = {name: getattr(self, name) for name in ("bigrams", "starts", "tokens", "weights")}
        try:
            save_file(arrays, path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"aded: cannot write the table {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> TrigramTable:
        """Read what `save` wrote.

        Raises:
            UserError: no such file, not a table, or a damaged one.
        """
        try:
            arrays = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"aded: cannot read the table {path}: {error}") from error
        kinds = {"bigrams": np.int64, "starts": np.int64, "tokens": np.int32, "weights": np.float32}
        if any(name not in arrays or arrays[name].dtype != kind for name, kind in kinds.items()):
            raise UserError(f"aded: {path} is not a table of tri-grams: write one with TrigramTable.save")
        table = cls(*(arrays[name] for name in kinds))
        if not table._sound():
            raise UserError(f"aded: the table {path} is damaged: its arrays do not fit together")
        return table

    def _sound(self) -> bool:
        starts, count = self.starts, len(self.bigrams)
        return bool(
            len(starts) == count + 1
            and len(self.tokens) == len(self.weights)
            and starts[0] == 0
            and starts[-1] == len(self.tokens)
            and (np.diff(starts) > 0).all()
            and (np.diff(self.bigrams) > 0).all()
            and (self.tokens >= 0).all()
            and (np.isfinite(self.weights) & (self.weights > 0)).all()
        )


def build_table(sequences: Iterable[Sequence[int]], successors: int = 12) -> TrigramTable:
    """Count the tri-grams of token sequences; none spans two of them.

    Args:
        sequences: token ids of documents, or of answers of the target, which serve better.
        successors: kept per bigram, the most frequent ones.

    Raises:
        UserError: no tri-gram at all, or a token id that is not in 0 .. 2^21 - 1.
    """
    packed = []
    for sequence in sequences:
        ids = np.asarray(sequence, dtype=np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < 1 << TOKEN_BITS:
            raise UserError(f"aded: token ids must be between 0 and {(1 << TOKEN_BITS) - 1}")
        packed.append(ids[:-2] << 2 * TOKEN_BITS | ids[1:-1] << TOKEN_BITS | ids[2:])
    trigrams, counts = np.unique(np.concatenate(packed) if packed else np.empty(0, np.int64), return_counts=True)
    if not len(trigrams):
        raise UserError("aded: nothing to count: give at least one sequence of three tokens")
    owners = trigrams >> TOKEN_BITS
    bigrams, first, sizes = np.unique(owners, return_index=True, return_counts=True)
    weights = counts / np.repeat(np.add.reduceat(counts, first), sizes)
    order = np.lexsort((trigrams, -counts, owners))
    kept = order[np.arange(len(order)) - np.repeat(first, sizes) < successors]
    return TrigramTable(
        bigrams,
        np.concatenate([[0], np.cumsum(np.minimum(sizes, successors))]).astype(np.int64),
        (trigrams[kept] & (1 << TOKEN_BITS) - 1).astype(np.int32),
        weights[kept].astype(np.float32),
    )


def read_texts(paths: Iterable[str | Path], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of UTF-8 text files, for `build_table`.

    Raises:
        UserError: a file that cannot be read.
    """
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"aded: cannot read {path}: {error}") from error
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@dataclass(slots=True)
class _Successors:
    """Successors of one bigram, heaviest first."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, token: int, increment: float, cap: float, limit: int) -> None:
        """Raise a token's weight; a new one displaces the lightest where there is no place left."""
        weight = increment
        if token in self.tokens:
            at = self.tokens.index(token)
            weight += self.weights[at]
            del self.tokens[at], self.weights[at]
        elif len(self.tokens) >= limit:
            self.tokens.pop()
            self.weights.pop()
        weight = min(weight, cap)
        # Of equals, the one seen last comes first.
        at = bisect_left(self.weights, -weight, key=neg)
        self.tokens.insert(at, token)
        self.weights.insert(at, weight)


@dataclass(slots=True, eq=False)
class _Node:
    """A node of the search: `prior` is its edge's probability, `probability` its path's, `worth` its path's value."""

    pair: tuple[int, int]
    parent: _Node | None
    depth: int
    prior: float
    probability: float
    worth: float
    visits: int = 0
    value: float = 0.0
    children: list[_Node] | None = None


@register(
    "aded",
    family="drafters",
    exactness="lossless",
    paper="2407.12021",
    title="ADED: an adaptive tri-gram table, searched as a tree",
    parameters=AdedParameters,
)
class Aded(Drafter):
    """The counted table serves all and never changes; what texts add lies over it, in entries of their owner."""

    def __init__(self, target: Target, parameters: AdedParameters) -> None:
        self.parameters = parameters
        self._barred = target.end_ids.union(target.tokenizer.all_special_ids if target.tokenizer is not None else ())
        self._table = TrigramTable.load(parameters.table) if parameters.table else None
        if self._table is not None and int(self._table.tokens.max()) >= target.model.config.vocab_size:
            raise UserError(f"aded: the table {parameters.table} was counted with another tokenizer than the model's")
        self._adapted: OrderedDict[tuple[str | int, int, int], _Successors] = OrderedDict()
        self._counted: dict[int, int] = {}

    @property
    def memory_bytes(self) -> int:
        """Adapted entries as CPython stores them: about 400 bytes each, and 64 per successor."""
        adapted = sum(400 + 64 * len(known.tokens) for known in self._adapted.values())
        return adapted + (self._table.memory_bytes if self._table is not None else 0)

    def growth_bytes(self, requests: Sequence[Request], rows: int = 0) -> int:
        unread = sum(len(request.tokens) - self._counted.get(request.id, 0) for request in requests)
        return unread * (400 + 64 * self.parameters.successors)

    def propose(self, request: Request, budget: int) -> Draft:
        self._adapt(request)
        nodes = min(self.parameters.nodes, budget)
        if len(request.tokens) < 2 or nodes < 1 or request.tokens[-1] in self._barred:
            return Draft()
        if self.parameters.search == "puct":
            return self._by_puct(request, nodes)
        return self._by_heap(request, nodes)

    def end(self, request: Request) -> None:
        if self.parameters.shared:
            self._adapt(request)
        else:
            for key in [key for key in self._adapted if key[0] == request.id]:
                del self._adapted[key]
        self._counted.pop(request.id, None)

    def _owner(self, request: Request) -> str | int:
        """Whose entries a request reads and writes: its tenant's, or its own."""
        return request.params.tenant if self.parameters.shared else request.id

    # The table

    def _adapt(self, request: Request) -> None:
        """Count the tri-grams that end in tokens not counted yet."""
        if self.parameters.increment == 0:
            return
        tokens, owner = request.tokens, self._owner(request)
        begin = 0 if request.choice == 0 or not self.parameters.shared else request.prompt_length
        for at in range(max(self._counted.get(request.id, begin), 2), len(tokens)):
            self._count(owner, tokens[at - 2], tokens[at - 1], tokens[at])
        self._counted[request.id] = len(tokens)

    def _count(self, owner: str | int, first: int, second: int, third: int) -> None:
        key = (owner, first, second)
        known = self._adapted.get(key)
        if known is None:
            tokens, weights = self._table.after(first, second) if self._table is not None else ([], [])
            limit = self.parameters.successors
            known = self._adapted[key] = _Successors(tokens[:limit], weights[:limit])
            if len(self._adapted) > self.parameters.bigrams:
                self._adapted.popitem(last=False)
        else:
            self._adapted.move_to_end(key)
        known.add(third, self.parameters.increment, self.parameters.cap, self.parameters.successors)

    def _after(self, owner: str | int, pair: tuple[int, int]) -> tuple[list[int], list[float]]:
        """Successors and their probabilities, likeliest first: the owner's if there are any, else as counted."""
        known = self._adapted.get((owner, *pair))
        if known is not None:
            tokens, weights = known.tokens, known.weights
        elif self._table is not None:
            tokens, weights = self._table.after(*pair)
            tokens, weights = tokens[: self.parameters.successors], weights[: self.parameters.successors]
        else:
            return [], []
        total = sum(weights)
        return tokens, [weight / total for weight in weights]

    # The searches

    def _by_heap(self, request: Request, nodes: int) -> Draft:
        """The likeliest prefixes, likeliest first; a node enters the heap when its parent and elder sibling leave."""
        owner, levels, barred = self._owner(request), self.parameters.depth, self._barred
        draft = Draft()
        # Ordered by probability, then by age. An entry is one of several siblings: `above` is their parent's
        # probability, `shares` are theirs, `rank` says which one, `before` is the token above them.
        heap: list[tuple[float, int, list[int], list[float], float, int, int, int, int]] = []
        age = 0
        tokens, shares = self._after(owner, (request.tokens[-2], request.tokens[-1]))
        if tokens:
            heap.append((-shares[0], age, tokens, shares, 1.0, 0, ROOT, request.tokens[-1], 1))
        while heap and len(draft.tokens) < nodes:
            negative, _, tokens, shares, above, rank, parent, before, level = heappop(heap)
            token, node = tokens[rank], len(draft.tokens)
            draft.tokens.append(token)
            draft.parents.append(parent)
            draft.estimates.append(-negative)
            if rank + 1 < len(tokens):
                age += 1
                item = (-above * shares[rank + 1], age, tokens, shares, above, rank + 1, parent, before, level)
                heappush(heap, item)
            if level < levels and token not in barred:
                tokens, shares = self._after(owner, (before, token))
                if tokens:
                    age += 1
                    item = (negative * shares[0], age, tokens, shares, -negative, 0, node, token, level + 1)
                    heappush(heap, item)
        return draft

    def _by_puct(self, request: Request, nodes: int) -> Draft:
        """Paths by visits of a Monte-Carlo tree search, each with its likeliest successor; trimmed by probability."""
        owner = self._owner(request)
        # The rollouts' luck belongs to the request and the place, not to the batch.
        rng = random.Random(request.sampler.coins(len(request.tokens), SEARCH_PURPOSE).draw())
        root = _Node((request.tokens[-2], request.tokens[-1]), None, 0, 1.0, 1.0, 1.0)
        for _ in range(self.parameters.iterations):
            node = self._descend(owner, root)
            value = self._rollout(owner, node, rng)
            back: _Node | None = node
            while back is not None:
                back.visits += 1
                back.value += value
                back = back.parent
        visited, frontier = [], [root]
        while frontier:
            frontier = [child for node in frontier for child in node.children or () if child.visits]
            visited += frontier
        visited.sort(key=lambda node: (-node.visits, -node.probability, node.depth))
        chosen = dict.fromkeys(visited[: self.parameters.paths])
        for node in [*chosen] or [root]:
            chosen |= dict.fromkeys(self._expanded(owner, node)[:1])
        number = {root: ROOT}
        draft = Draft()
        # Stable, and a child comes after its parent: its probability is no larger, and it is deeper.
        for node in sorted(chosen, key=lambda node: (-node.probability, node.depth))[:nodes]:
            assert node.parent is not None
            number[node] = len(draft.tokens)
            draft.tokens.append(node.pair[1])
            draft.parents.append(number[node.parent])
            draft.estimates.append(node.probability)
        return draft

    def _expanded(self, owner: str | int, node: _Node) -> list[_Node]:
        """The children of a node, likeliest first, made at the first visit."""
        if node.children is None:
            last = node.pair[1]
            tokens, shares = ([], []) if last in self._barred else self._after(owner, node.pair)
            node.children = [
                _Node((last, token), node, node.depth + 1, share, node.probability * share, node.worth + share)
                for token, share in zip(tokens, shares, strict=True)
            ]
        return node.children

    def _descend(self, owner: str | int, node: _Node) -> _Node:
        """Select by the PUCT rule down to a node that was never visited, or to the last level."""
        c1, c2 = self.parameters.c1, self.parameters.c2
        while node.depth < self.parameters.depth - 1:
            children = self._expanded(owner, node)
            if not children:
                break
            fresh = next((child for child in children if not child.visits), None)
            if fresh is not None:
                return fresh
            factor = (c1 + log((node.visits + c2 + 1) / c2)) * sqrt(node.visits)
            node = max(
                children,
                key=lambda child: child.value / child.visits + factor * child.prior / (1 + child.visits),
            )
        return node

    def _rollout(self, owner: str | int, node: _Node, rng: random.Random) -> float:
        """1 plus the probabilities along the path, which goes on at random from `node` to the last level."""
        value, pair = node.worth, node.pair
        for _ in range(self.parameters.depth - 1 - node.depth):
            tokens, shares = ([], []) if pair[1] in self._barred else self._after(owner, pair)
            if not tokens:
                break
            at = rng.choices(range(len(tokens)), shares)[0]
            value += shares[at]
            pair = (pair[1], tokens[at])
        return value
