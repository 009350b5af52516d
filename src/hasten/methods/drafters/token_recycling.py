"""Token Recycling: the runners-up of every verified row are kept per token, and laid out as a tree the next time.

"Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling", 2024, arXiv
2408.08696. A matrix holds, for each token of the vocabulary, the k likeliest next tokens as the target saw them when
the token was last an input. Drafting looks successors up, level by level, on a fixed tree; verification gives a fresh
row for every token it read, rejected ones included. No model, no search, about 2 MB for 32,000 tokens. Exactness:
lossless, greedy and sampling (deterministic children).

Decisions where the paper leaves room, or where its script does something else:

- *Tree.* The published one has 80 nodes, too many to verify on a CPU. `nodes` takes the most useful ones: a node's
  worth is the product of its candidates' measured acceptance (`RANKS`), so every prefix is closed under ancestors.
- *Order of updates.* Of the nodes with the same token the last one's row stays. Runs are reproducible.
- *Cold rows* propose nothing, where the script proposes token 0.
- *Prompt.* The script never looks at it. `warm_prompt` puts the successors that tokens have in the prompt in front of
  their rows, the latest first. What verification shows later replaces them.
- *Who shares.* One matrix serves all requests of a tenant; the default tenant's may be kept in a file.
"""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hasten.engine import ROOT, Draft, Drafter, Observation, Request, Target, register
from hasten.engine.prompt import EMBEDDED
from hasten.errors import UserError
from hasten.methods.drafters.runners_up import groups_of, largest

CHILDREN = (
    "8",
    "84321111",
    "832111112100100101100",
    "5211100010010000001001100",
    "311001000010100",
    "20010000",
)
"""The published tree "2.2.2": per level, how many children each node of the level above has, in order."""
RANKS = (0.6, 0.09, 0.045, 0.022, 0.015, 0.012, 0.01, 0.008)
"""How often candidate 0, 1, ... of an accepted node is accepted, as measured on tasks and prose with all 80 nodes. It
orders the nodes, and is where their estimates start."""
PRIOR = 8.0
"""How many observations the start is worth."""
UNKNOWN = -1
"""In the matrix: no such candidate. As an index it names the last row, which holds nothing else, so that whatever
stands below an unknown node is unknown without a test."""

Matrix = NDArray[np.int32]


@dataclass(frozen=True)
class TokenRecyclingParameters:
    """Parameters; the authors' tree is `nodes=80`.

    Attributes:
        nodes: of the tree, the most useful ones first (it has 80, fewer with fewer candidates); 7 and the root are 8
            rows, which cost little more than one where the step is bound by memory.
        candidates: successors kept per token (the paper's k).
        warm_prompt: put the prompt's own pairs of tokens into the matrix before decoding.
        shared: one matrix for all requests of a tenant; else one per request, which dies with it.
        tenants: how many named tenants are remembered; the least recently seen is forgotten. The default tenant is not
            counted.
        store: a file that the default tenant's matrix is read from, and written to when a request of its ends.

    Raises:
        UserError: out of range, or a store without sharing.
    """

    nodes: int = 7
    candidates: int = 8
    warm_prompt: bool = True
    shared: bool = True
    tenants: int = 16
    store: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= 80:
            raise UserError("token-recycling: nodes must be between 1 and 80")
        if not 1 <= self.candidates <= len(RANKS):
            raise UserError(f"token-recycling: candidates must be between 1 and {len(RANKS)}")
        if self.nodes > (most := len(template(self.candidates))):
            raise UserError(f"token-recycling: nodes must be at most {most} with candidates={self.candidates}")
        if not 1 <= self.tenants <= 4096:
            raise UserError("token-recycling: tenants must be between 1 and 4096")
        if self.store and not self.shared:
            raise UserError("token-recycling: a store needs shared=true")


def template(candidates: int = 8) -> list[tuple[int, ...]]:
    """The published tree's paths, most useful first: (2, 0) is candidate 0 of the root's candidate 2.

    Paths with candidates that are not kept are left out.
    """
    level: list[tuple[int, ...]] = [()]
    paths: list[tuple[int, ...]] = []
    for counts in CHILDREN:
        level = [(*path, rank) for path, count in zip(level, counts, strict=True) for rank in range(int(count))]
        paths += level
    paths = [path for path in paths if max(path) < candidates]
    return sorted(paths, key=lambda path: -_worth(path))


def _worth(path: Sequence[int]) -> float:
    """Probability that a node is accepted, as far as its candidates' ranks tell."""
    return math.prod(RANKS[rank] for rank in path)


class _Tree:
    """A template compiled for lookups: nodes in order of use, and by level.

    `parents` and `worth` are per node. `levels` are three index arrays each: nodes, their parents, their ranks.
    """

    def __init__(self, paths: Sequence[tuple[int, ...]]) -> None:
        number = {path: node for node, path in enumerate(paths)} | {(): ROOT}
        self.parents = [number[path[:-1]] for path in paths]
        self.worth = [_worth(path) for path in paths]
        self.levels: list[tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]] = []
        for depth in range(1, max(map(len, paths)) + 1):
            nodes = [node for node, path in enumerate(paths) if len(path) == depth]
            columns = nodes, [self.parents[node] for node in nodes], [paths[node][-1] for node in nodes]
            self.levels.append(tuple(np.array(column, dtype=np.intp) for column in columns))  # type: ignore[arg-type]

    def fill(self, successors: Matrix, root: int) -> list[int]:
        """The token of each node, or UNKNOWN: one gather per level."""
        # The root stands last, where ROOT as an index finds it.
        tokens = np.full(len(self.parents) + 1, root, dtype=np.intp)
        for nodes, parents, ranks in self.levels:
            tokens[nodes] = successors[tokens[parents], ranks]
        found: list[int] = tokens[:-1].tolist()
        return found


class _Memory:
    """What is remembered for one tenant: int32 [vocabulary + 1, candidates], and how the tree's nodes fared.

    A row never holds a token twice. Unknown candidates are `UNKNOWN` and stand last.
    """

    def __init__(self, vocabulary: int, candidates: int, tree: _Tree) -> None:
        self.successors: Matrix = np.full((vocabulary + 1, candidates), UNKNOWN, dtype=np.int32)
        self.tried = [PRIOR] * len(tree.parents)
        self.accepted = [PRIOR * worth for worth in tree.worth]

    @property
    def bytes(self) -> int:
        return self.successors.nbytes + 16 * len(self.tried)


@dataclass
class _Proposal:
    """A draft behind `start` tokens with the tree's node for each of its own, until what comes next is known."""

    start: int
    draft: Draft
    nodes: list[int]


@register(
    "token-recycling",
    family="drafters",
    exactness="lossless",
    paper="2408.08696",
    title="Token Recycling: the target's runners-up, as a tree",
    parameters=TokenRecyclingParameters,
)
class TokenRecycling(Drafter):
    """The matrix is on the CPU, where drafts are made; a step moves `candidates` numbers per row there."""

    def __init__(self, target: Target, parameters: TokenRecyclingParameters) -> None:
        self.parameters = parameters
        self.vocabulary = target.model.config.vocab_size
        self.candidates = min(parameters.candidates, self.vocabulary)
        self.tree = _Tree(template(self.candidates)[: parameters.nodes])
        self._default = self._fresh()
        self._tenants: dict[str, _Memory] = {}
        self._private: dict[int, _Memory] = {}
        self._proposals: dict[int, _Proposal] = {}
        self._store = Path(parameters.store).expanduser() if parameters.store else None
        if self._store is not None:
            self._load(self._store)

    @property
    def memory_bytes(self) -> int:
        return sum(memory.bytes for memory in (self._default, *self._tenants.values(), *self._private.values()))

    def growth_bytes(self, requests: Sequence[Request], rows: int = 0) -> int:
        if self.parameters.shared:
            new = {request.params.tenant for request in requests} - {"", *self._tenants}
            return len(new) * self._default.bytes
        return sum(request.id not in self._private for request in requests) * self._default.bytes

    def scratch_bytes(self, requests: Sequence[Request], nodes: int) -> int:
        # Of one request's rows at a time: the maxima of groups, those groups, and what is found.
        vocabulary = max(request.sampler.vocabulary for request in requests)
        groups, group = groups_of(vocabulary, self.candidates)
        return (nodes + 1) * (4 * groups + self.candidates * (4 * group + 64))

    def begin(self, request: Request) -> None:
        if self.parameters.warm_prompt:
            _warm(self._memory(request).successors, [token for token in request.tokens if token != EMBEDDED])

    def propose(self, request: Request, budget: int) -> Draft:
        memory = self._memory(request)
        tokens = self.tree.fill(memory.successors, request.tokens[-1])
        proposal = _Proposal(len(request.tokens), Draft(), [])
        draft, number = proposal.draft, {ROOT: ROOT}
        for node, (token, parent) in enumerate(zip(tokens, self.tree.parents, strict=True)):
            if token == UNKNOWN:
                continue
            if len(draft) >= budget:
                break
            number[node] = len(draft)
            estimate = memory.accepted[node] / memory.tried[node]
            if parent != ROOT:
                estimate = min(estimate, draft.estimates[number[parent]])
            draft.tokens.append(token)
            draft.parents.append(number[parent])
            draft.estimates.append(estimate)
            proposal.nodes.append(node)
        self._proposals[request.id] = proposal
        return draft

    def observe(self, request: Request, seen: Observation) -> None:
        """Recycle all rows, whoever drafted them, and judge the last proposal by the tokens that came."""
        memory = self._memory(request)
        root = request.tokens[-len(seen.tokens) - 1]
        rows = largest(seen.logits, self.candidates)[1].astype(np.int32)
        fed = [root, *seen.draft.tokens]
        if root == EMBEDDED:
            # A prompt may end in an embedding, which is no token's row.
            fed, rows = fed[1:], rows[1:]
        # Of several assignments to one row NumPy keeps the last.
        memory.successors[fed] = rows
        proposal = self._proposals.pop(request.id, None)
        # One that was not judged in its step, since nobody showed that, says nothing of a later one.
        if proposal is not None and proposal.start == len(request.tokens) - len(seen.tokens):
            self._judge(memory, proposal, seen.tokens)

    def end(self, request: Request) -> None:
        self._proposals.pop(request.id, None)
        self._private.pop(request.id, None)
        if self._store is not None and not request.params.tenant:
            self._save(self._store)

    def _memory(self, request: Request) -> _Memory:
        """The memory that a request reads and writes."""
        if not self.parameters.shared:
            if request.id not in self._private:
                self._private[request.id] = self._fresh()
            return self._private[request.id]
        tenant = request.params.tenant
        if not tenant:
            return self._default
        # A dictionary remembers the order of insertion: the first entry is the least recently used.
        memory = self._tenants.pop(tenant) if tenant in self._tenants else self._fresh()
        self._tenants[tenant] = memory
        if len(self._tenants) > self.parameters.tenants:
            del self._tenants[next(iter(self._tenants))]
        return memory

    def _fresh(self) -> _Memory:
        return _Memory(self.vocabulary, self.candidates, self.tree)

    def _judge(self, memory: _Memory, proposal: _Proposal, came: list[int]) -> None:
        """Count which nodes were right; those behind the last token that came are not known, and not counted."""
        for node, right in zip(proposal.nodes, proposal.draft.judged(came), strict=True):
            if right is not None:
                memory.tried[node] += 1
                memory.accepted[node] += right

    def _load(self, store: Path) -> None:
        """Read the default tenant's matrix, where there is one already."""
        if not store.parent.is_dir():
            raise UserError(f"token-recycling: there is no folder {store.parent} to keep {store.name} in")
        if not store.exists():
            return
        try:
            known = load_file(store)["successors"]
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(f"token-recycling: {store} is not a store of this method: {error}") from error
        wanted = self._default.successors
        if known.dtype != wanted.dtype or known.ndim != 2:
            raise UserError(f"token-recycling: {store} is not a store of this method: {known.dtype} {known.shape}")
        if known.shape != wanted.shape:
            rows, columns = known.shape
            raise UserError(
                f"token-recycling: {store} holds {columns} candidates for each of {rows - 1} tokens; this model and "
                f"method have {self.candidates} for each of {self.vocabulary}"
            )
        if known.min() < UNKNOWN or known.max() >= self.vocabulary or known[-1].max() != UNKNOWN:
            raise UserError(f"token-recycling: {store} is damaged: it names tokens outside the vocabulary")
        self._default.successors = known

    def _save(self, store: Path) -> None:
        """Replace the file whole, so that nobody ever reads half of one; decoding goes on without it if that fails."""
        try:
            with tempfile.TemporaryDirectory(dir=store.parent, prefix=f".{store.name}.") as folder:
                fresh = Path(folder) / store.name
                save_file({"successors": self._default.successors}, fresh)
                os.replace(fresh, store)
        except (OSError, SafetensorError) as error:
            self._store = None
            warnings.warn(f"token-recycling: {store} is no longer kept: {error}", RuntimeWarning, stacklevel=2)


def _warm(successors: Matrix, tokens: Sequence[int]) -> None:
    """Put the tokens that follow a token in a prompt in front of its row, the latest first."""
    followers: dict[int, dict[int, None]] = {}
    for position in range(len(tokens) - 1, 0, -1):
        followers.setdefault(tokens[position - 1], {})[tokens[position]] = None
    width = successors.shape[1]
    for token, latest in followers.items():
        row = list(latest | dict.fromkeys(successors[token].tolist()))[:width]
        # A row that was short keeps UNKNOWN at its end.
        successors[token, : len(row)] = row
