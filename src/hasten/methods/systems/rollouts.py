"""What the drafter of Mirror-SD does while the target verifies: a window for every likely outcome of it.

Each request has a tree below its last token: the *window* that is being verified, behind each of its rows the tokens
that the target's middle layer takes for its answer there (*candidates*), and behind each of these the chain that the
small model goes on with. When the verdict comes, one of the chains is the next window, or the small model starts anew.

`Rollouts` knows requests by their ids, and is told tokens only, so it may live in another process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hasten.engine import ROOT, Draft, Observation, Request
from hasten.engine.prompt import EMBEDDED
from hasten.engine.sampling.bans import Bans
from hasten.engine.sampling.grammar import Grammars, GrammarState
from hasten.engine.sampling.params import SamplingParams
from hasten.engine.sampling.sampler import Sampler
from hasten.engine.stopping import Stopper
from hasten.methods.drafters.sequences import Sequences
from hasten.methods.drafters.small_model import Growth, SmallCheckpoint, SmallModelDrafter
from hasten.model.tokenizer import load_tokenizer

EVERYTHING = 1 << 30
"""More nodes, and levels, than a tree has."""

Source = Literal["hit", "miss", "cold"]
"""How a window came: as a candidate's chain; by starting anew where none of them was right; or as the first one."""


@dataclass(frozen=True)
class Opening:
    """What of a request the drafter has to know.

    Attributes:
        id: the request's.
        tokens: its prompt.
        params: of sampling, without what reads text.
        choice: which of the n choices it is.
        vocabulary: of the target's logits.
        bans: as they are at its start.
        left: tokens that may come.
    """

    id: int
    tokens: list[int]
    params: SamplingParams
    choice: int
    vocabulary: int
    bans: Bans
    left: int

    @classmethod
    def of(cls, request: Request) -> Opening:
        """A request that has just begun."""
        # Its tokens are compared with the target's own draws; stop strings are looked for in the target's text.
        params = replace(request.params, acceptance="match", stop=())
        sampler, prompt = request.sampler, request.tokens[: request.prompt_length]
        left = request.stopper.left + len(request.output)
        return cls(request.id, prompt, params, request.choice, sampler.vocabulary, sampler.bans, left)


class Window(NamedTuple):
    """A chain to be verified, and the probability that the target agrees so far, per token."""

    tokens: list[int]
    estimates: list[float]
    source: Source


class Spent(NamedTuple):
    """Seconds of the drafter since the verdict before: on chains behind candidates, and on windows begun anew."""

    rollouts: float
    fallback: float


class Tree(Growth):
    """A request's window, and what may come behind it.

    Args:
        length: of each chain, at most.
        confidence: a chain ends when all of it together has less probability.

    Attributes:
        branches: candidates by how many of the window's tokens are accepted before them, and what they say.
        chains: nodes that the small model adds, by what they start behind: ROOT (the window) or a candidate.
        source: how the window came.
    """

    def __init__(self, drafter: Rollouts, request: Request, source: Source) -> None:
        super().__init__(drafter, request, EVERYTHING, EVERYTHING)
        self._most, self._confidence = drafter.chain, drafter.confidence
        self.source: Source = source
        self.branches: dict[tuple[int, int], int] = {}
        self.chains: dict[int, list[int]] = {ROOT: []}
        self._start: dict[int, int] = {ROOT: ROOT}
        self._chances: dict[int, float] = {}

    @property
    def window(self) -> list[int]:
        """Its nodes."""
        return self.chains[ROOT]

    @property
    def unfed(self) -> list[int]:
        """Nodes of the window that the small model has not read."""
        return [node for node in self.window if self.row(node) is None]

    def shown(self) -> Window:
        """The window as the target gets it."""
        draft = self.draft
        tokens = [draft.tokens[node] for node in self.window]
        return Window(tokens, [draft.estimates[node] for node in self.window], self.source)

    def grow(self, logits: Tensor) -> None:
        """One more token for each chain whose last node is read now; other nodes are read for those behind them."""
        tips: list[int] = []
        for node, children in zip(self.frontier, self.children(logits, 1), strict=True):
            start = self._start[node]
            drawn = next(children, None) if node == self._tip(start) else None
            if drawn is not None:
                tips.append(self._append(start, *drawn))
        self.frontier = list(filter(self._goes_on, tips))

    def consider(self, accepted: int, tokens: Sequence[int]) -> None:
        """Grow chains behind candidates, which follow so many accepted tokens of the window."""
        parent = self.window[accepted - 1] if accepted else ROOT
        for token in tokens:
            node = self.add(parent, token, 1.0)
            self.values[node] = 1.0
            self.branches[accepted, token] = node
            self.chains[node], self._start[node] = [], node
            if self._goes_on(node):
                self.frontier.append(node)

    def follow(self, came: Sequence[int]) -> tuple[int | None, list[int]]:
        """What the tree has behind tokens that came, and the rows of the small model's latest passes that are theirs.

        Returns:
            The start of a chain, None where there is none; numbers of pending rows.
        """
        if not came:
            return ROOT, []
        accepted = self.window[: len(came) - 1]
        if [self.draft.tokens[node] for node in accepted] != list(came[:-1]):
            return None, []
        start = self.branches.get((len(accepted), came[-1]))
        nodes = accepted if start is None else [*accepted, start]
        return start, [row for row in map(self.row, nodes) if row is not None]

    def adopt(self, other: Tree, start: int) -> None:
        """Take another tree's chain as the window, as far as it has grown."""
        above = start
        for node in other.chains[start]:
            token = other.draft.tokens[node]
            case = other.matching.cases.get((above, token))
            if case is not None:
                self.matching.cases[self._tip(ROOT), token] = case
            self._append(ROOT, token, other._chances[node])
            above = node
        # Where it may go on, all of it has to be read again: rows behind other tokens are gone.
        if self.window:
            self.frontier = self.window.copy() if self._goes_on(self.window[-1]) else []

    def _append(self, start: int, token: int, chance: float) -> int:
        node = self.add(self._tip(start), token, chance)
        self.chains[start].append(node)
        self._start[node], self._chances[node] = start, chance
        return node

    def _tip(self, start: int) -> int:
        return self.chains[start][-1] if self.chains[start] else start

    def _goes_on(self, node: int) -> bool:
        """Whether something is drafted behind a node: not behind the end of a text, nor beyond any limit."""
        short = len(self.chains[self._start[node]]) < self._most and len(self.paths[node]) < self.depth
        return short and self.draft.tokens[node] not in self.closed and self.values[node] >= self._confidence


class Rollouts(SmallModelDrafter):
    """Windows for requests, and chains behind the candidates of each.

    Args:
        checkpoint: of the small model, which is loaded.
        target: folder or file of the target, whose tokenizer constraints are compiled with.
        end_ids: that end the target's texts.
        length, confidence: see `Tree`.
        width: candidates per row, at most.

    Raises:
        UserError: a checkpoint that cannot be loaded.
    """

    def __init__(
        self,
        checkpoint: SmallCheckpoint,
        target: Path,
        end_ids: frozenset[int],
        length: int,
        confidence: float,
        width: int,
    ) -> None:
        super().__init__(checkpoint.load(), end_ids)
        self._target = target
        self._grammars: Grammars | None = None
        self.chain, self.confidence = length, confidence
        candidates = width * (length + 1)
        self._widest = max(length, candidates)
        # All that a tree may have pending, and what may come before the next one begins.
        self._sequences = Sequences(self.cache, self.length, 2 * length + candidates * length + 1)
        self._requests: dict[int, Request] = {}
        self._trees: dict[int, Tree] = {}
        self._rolled = 0.0

    def open(self, opening: Opening) -> None:
        """A request begins, or is begun again."""
        self.close(opening.id)
        words = [token for token in opening.tokens if token != EMBEDDED]
        tokens = [max(token, 0) for token in opening.tokens]
        grammar = self._grammar(opening)
        sampler = Sampler(opening.params, opening.choice, words, opening.vocabulary, grammar, deepcopy(opening.bans))
        self._requests[opening.id] = Request(
            id=opening.id,
            tokens=tokens,
            prompt_length=len(tokens),
            params=opening.params,
            choice=opening.choice,
            method="",
            sequence=self.cache.sequence(),
            sampler=sampler,
            stopper=Stopper(opening.params, self.end_ids, None, opening.left, False),
        )

    def _grammar(self, opening: Opening) -> GrammarState | None:
        """Of a request's constraint."""
        if opening.params.constraint is None:
            return None
        if self._grammars is None:
            self._grammars = Grammars(load_tokenizer(self._target), opening.vocabulary, self.end_ids)
        return self._grammars.start(opening.params.constraint)

    def close(self, request: int) -> None:
        """A request is over."""
        known = self._requests.pop(request, None)
        self._trees.pop(request, None)
        if known is not None:
            self.end(known)

    def held(self) -> int:
        """Bytes of caches and weights."""
        return self.memory_bytes

    def growth(self, asked: Sequence[tuple[int, int, int]]) -> int:
        """See `Sequences.growth_of`; of several requests."""
        return sum(self._sequences.growth_of(*each) for each in asked)

    def scratch(self, requests: Sequence[int], nodes: int) -> int:
        """Bytes that drafts for these requests, by their numbers, take for a while; see `Drafter.scratch_bytes`."""
        return self.scratch_bytes([self._requests[each] for each in requests if each in self._requests], nodes)

    def widest(self, nodes: int) -> int:
        return self._widest

    def start(self, request: Request, budget: int) -> Tree:
        return Tree(self, request, "cold")

    @torch.inference_mode()
    def windows(self, asked: Sequence[tuple[int, Sequence[int]]]) -> tuple[list[Window], Spent]:
        """What is to be verified next.

        Args:
            asked: requests by id, and the tokens that came since they were asked for before.
        """
        started = time.perf_counter()
        trees = [self._advance(self._requests[request], came) for request, came in asked]
        fresh = [tree for tree in trees if tree.frontier and not tree.window]
        if fresh:
            self._grow(fresh, self._read(fresh))
        while active := [tree for tree in trees if tree.frontier]:
            self._grow(active, self._expand(active))
        for tree in trees:
            self.beliefs.drafted(tree.request, tree.matching, tree.draft.subset(tree.window))
        rolled, seconds, self._rolled = self._rolled, time.perf_counter() - started, 0.0
        spent = Spent(rolled, seconds) if fresh else Spent(rolled + seconds, 0.0)
        return [tree.shown() for tree in trees], spent

    @torch.inference_mode()
    def ahead(self) -> None:
        """Read the windows that have been handed out, while the target begins to verify them."""
        trees = [tree for tree in self._trees.values() if tree.unfed]
        kept = [tree.frontier for tree in trees]
        for tree in trees:
            tree.frontier = tree.unfed
        if trees:
            self._expand(trees, heard=False)
        for tree, frontier in zip(trees, kept, strict=True):
            tree.frontier = frontier

    def branch(self, messages: Sequence[tuple[int, Sequence[Sequence[int]]]]) -> None:
        """What the target's middle layer says of a verification: per request, behind each row, its candidates."""
        for request, rows in messages:
            for accepted, tokens in enumerate(rows):
                self._trees[request].consider(accepted, tokens)

    @torch.inference_mode()
    def round(self) -> bool:
        """One pass: a token more behind all candidates that need one; whether there were any."""
        trees = [tree for tree in self._trees.values() if tree.frontier]
        if not trees:
            return False
        started = time.perf_counter()
        self.ahead()
        self._grow(trees, self._expand(trees))
        self._rolled += time.perf_counter() - started
        return True

    def _advance(self, request: Request, came: Sequence[int]) -> Tree:
        """A request's next tree, with what the one before has of it, behind tokens that came."""
        before = self._trees.get(request.id)
        start, rows = (None, []) if before is None else before.follow(came)
        if before is not None:
            self._sequences.of(request).commit(rows)
        request.tokens += came
        request.sampler.committed(came)
        request.stopper.accept(came)
        nothing = torch.empty(0, 0)
        self.beliefs.observe(request, Observation(Draft(), [], list(came), nothing, {}))
        source: Source = "cold" if before is None else "miss" if start is None else "hit"
        tree = self._trees[request.id] = Tree(self, request, source)
        if before is not None and start is not None:
            tree.adopt(before, start)
        return tree
