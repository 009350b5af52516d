"""What the drafter of Mirror-SD does while the target verifies: a window for every likely outcome of it.

Each request has a tree below its last token: the *window* that is being verified, behind each of its rows the tokens
that the target's middle layer takes for its answer there (*candidates*), and behind each of these the chain that the
small model goes on with. When the verdict comes, one of the chains is the next window, or the small model starts anew.

A small model with streams (`streams.py`) guesses further tokens of each chain, and reads them with the next one that it
says; the chains are those that it says without.

`Rollouts` knows requests by their ids, and is told tokens only, so it may live in another process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hasten.engine import Draft, Observation, Request
from hasten.engine.prompt import EMBEDDED
from hasten.engine.sampling.bans import Bans
from hasten.engine.sampling.grammar import Grammars, GrammarState
from hasten.engine.sampling.params import SamplingParams
from hasten.engine.sampling.sampler import Sampler
from hasten.engine.stopping import Stopper
from hasten.methods.drafters.sequences import Sequences
from hasten.methods.drafters.small_model import SmallCheckpoint, SmallModelDrafter
from hasten.methods.systems.chains import Source, Tree, Window
from hasten.methods.systems.streams import MOST, Streams
from hasten.model import Decoder, Rows
from hasten.model.tokenizer import load_tokenizer

STREAM_ROWS = 32
"""Rows of a pass with streams at most, theirs included: where there are many chains, there are fewer streams or none.
The paper has fewer for more requests, too; on a processor, rows cost more."""


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


class Spent(NamedTuple):
    """Of the drafter since the verdict before: seconds on chains behind candidates, and on windows begun anew; and its
    passes that were to say something."""

    rollouts: float
    fallback: float
    passes: int


class Rollouts(SmallModelDrafter):
    """Windows for requests, and chains behind the candidates of each.

    Args:
        checkpoint: of the small model, which is loaded.
        target: folder or file of the target, whose tokenizer constraints are compiled with.
        end_ids: that end the target's texts.
        length, confidence: of chains, see `Tree`.
        width: candidates per row, at most.
        streams: of the small model, at most; it may have none.

    Attributes:
        streams: None where there are none.

    Raises:
        UserError: a checkpoint that cannot be loaded, or damaged streams.
    """

    def __init__(
        self,
        checkpoint: SmallCheckpoint,
        target: Path,
        end_ids: frozenset[int],
        length: int,
        confidence: float,
        width: int,
        streams: int = MOST,
    ) -> None:
        super().__init__(checkpoint.load(), end_ids)
        own = Streams.load(checkpoint.folder, self.model) if isinstance(self.model, Decoder) else None
        self.streams = None if own is None else own.first(streams)
        self._target = target
        self._grammars: Grammars | None = None
        self._length, self._confidence = length, confidence
        candidates, streams = width * (length + 1), 0 if self.streams is None else len(self.streams)
        # Of a pass; the rows of streams are no more.
        guesses = min(candidates * streams, STREAM_ROWS)
        self._widest = max(length, candidates) + guesses
        # All that a tree may have pending, wrong guesses included, and what may come before the next one begins.
        pending = (2 + candidates + 2 * guesses) * length + guesses
        self._sequences = Sequences(self.cache, self.length, pending + 1)
        self._requests: dict[int, Request] = {}
        self._trees: dict[int, Tree] = {}
        self._now: Streams | None = None
        self._asked: list[int] = []
        self._states: Tensor | None = None
        self._rolled, self._passes = 0.0, 0

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
        return self._tree(request, "cold")

    def _tree(self, request: Request, source: Source) -> Tree:
        return Tree(self, request, self._length, self._confidence, source)

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
            self._say(fresh, self._read)
        while active := [tree for tree in trees if tree.frontier]:
            self._say(active, self._expand)
        for tree in trees:
            self.beliefs.drafted(tree.request, *tree.judged())
        rolled, seconds, self._rolled = self._rolled, time.perf_counter() - started, 0.0
        passes, self._passes = self._passes, 0
        spent = Spent(rolled, seconds, passes) if fresh else Spent(rolled + seconds, 0.0, passes)
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
        self._say(trees, self._expand)
        self._rolled += time.perf_counter() - started
        return True

    def _say(self, trees: Sequence[Tree], evaluate: Callable[[Sequence[Tree]], Tensor]) -> None:
        """A pass, what the small model says in it, and what its streams guess behind that."""
        starts = list(accumulate((len(tree.frontier) for tree in trees), initial=0))
        self._asked = [start + row for start, tree in zip(starts, trees, strict=False) for row in tree.asked]
        room = STREAM_ROWS - starts[-1]
        fits = max(0, room // len(self._asked)) if self._asked else 0
        self._now = None if self.streams is None else self.streams.first(fits)
        self._grow(trees, evaluate(trees))
        self._passes += 1
        if self._now is None:
            return
        assert isinstance(self.model, Decoder) and self._states is not None
        number = {row: place for place, row in enumerate(self._asked)}
        heard = [
            [row for row in tree.behind if start + row in number] for start, tree in zip(starts, trees, strict=False)
        ]
        places = [number[start + row] for start, rows in zip(starts, heard, strict=False) for row in rows]
        if not places:
            return
        logits, offset = self._now.logits(self.model, self._states[places]), 0
        for tree, rows in zip(trees, heard, strict=True):
            tree.foresee(rows, logits[offset : offset + len(rows)])
            offset += len(rows)

    def committed(self, rows: Rows, wanted: Sequence[int]) -> Tensor:
        """The pass over tokens of the text, and over nodes of drafts, with the streams that are asked."""
        if self._now is None or not wanted:
            return self.model.forward(rows, wanted)
        assert isinstance(self.model, Decoder)
        logits, self._states = self._now.forward(self.model, rows, wanted, [wanted[each] for each in self._asked])
        return logits

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
        tree = self._trees[request.id] = self._tree(request, source)
        if before is not None and start is not None:
            tree.adopt(before, start)
        return tree
