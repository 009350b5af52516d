"""A draft: tokens proposed for verification, as a tree below the last committed token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hasten.engine.prompt import EMBEDDED
from hasten.model.rows import Join

ROOT = -1
"""As a parent: the last committed token."""
MAX_DRAFT = 128
"""Nodes of one draft, whatever its drafter asks for."""


@dataclass(frozen=True)
class Drawn:
    """The distribution a node's children were sampled from, in draw order.

    `probabilities` is float64 [len(ids)] over `ids`, or over the whole vocabulary where `ids` is None. `replacement`
    says whether the same token could be drawn twice (SpecInfer) or not (Sequoia). Only the node's first `count`
    children (all, if None) were drawn; those after them are deterministic (a lookup beside a sampled branch).
    """

    probabilities: Tensor
    ids: Tensor | None = None
    replacement: bool = True
    count: int | None = None


@dataclass(frozen=True, eq=False)
class SoftRows:
    """Rows of a probe that are no tokens: trained vectors that stand where tokens are still unknown.

    Attributes:
        states: [rows, hidden], as which they enter.
        ahead: how far behind the probe's node each row stands, from 1 on; several may share a position.
        sees: boolean [rows, rows], which of them see which; the diagonal always is.
        join: where and how they enter in the middle of the pass, made of their node's state; then `states` say nothing.
    """

    states: Tensor
    ahead: tuple[int, ...]
    sees: Tensor
    join: Join | None = None

    def __len__(self) -> int:
        return len(self.ahead)


@dataclass(frozen=True)
class Probe:
    """Rows that a verification computes beside its nodes, to learn what the model predicts there: masks of a block
    behind it, or vectors that ask for what comes.

    They see `node` (or ROOT) and all above it, are seen by nothing else, and vanish with the step. Tokens stand at the
    positions behind it and see each other; `soft` rows (whose tokens are EMBEDDED) say that themselves.
    `Observation.probes` has their logits, but for those of the first `silent` rows, which nobody asks for: they cost
    no head. `Observation.probe_taps` has the states of all of them.
    """

    node: int
    tokens: list[int]
    silent: int = 0
    soft: SoftRows | None = None

    @classmethod
    def of(cls, node: int, soft: SoftRows) -> Probe:
        """Soft rows, of which nothing but the states is wanted."""
        return cls(node, [EMBEDDED] * len(soft), len(soft), soft)

    @property
    def ahead(self) -> Sequence[int]:
        """How far behind the node each row stands."""
        return range(1, len(self.tokens) + 1) if self.soft is None else self.soft.ahead

    @property
    def heard(self) -> int:
        """How many rows' logits are wanted."""
        return max(0, len(self.tokens) - self.silent)


@dataclass
class Draft:
    """Node i is `tokens[i]` below node `parents[i]` (ROOT or an earlier node).

    A node listed in `drawn` (or ROOT) has sampled children; all other nodes have deterministic ones (top-k, lookup).
    The acceptance rule follows from that, per node. `estimates` are the drafter's own, one per node or none at all: the
    probability that verification accepts the node and all above it. Their sum is the expected number of accepted
    tokens; planners read them. `probes` are further rows of the step. `transfer` is how far verification moves the
    target's distribution towards what a chain's nodes were drawn from (`verification.transfer`; lossy). A `trusted`
    chain is kept as it is (`verification.trust`; lossy), so it never gives way to anything, either.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    drawn: dict[int, Drawn] = field(default_factory=dict)
    estimates: list[float] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    transfer: float = 0.0
    trusted: bool = False

    @classmethod
    def chain(cls, tokens: Sequence[int], estimates: Sequence[float] = ()) -> Draft:
        """Each token below the one before."""
        return cls(list(tokens), list(range(-1, len(tokens) - 1)), estimates=list(estimates))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        return self.parents == list(range(-1, len(self.tokens) - 1))

    def depths(self) -> list[int]:
        """1 for children of the root, and so on."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths

    def probed(self) -> tuple[list[int], list[int]]:
        """Tokens of all probes' rows, and how far behind the root each row stands."""
        tokens: list[int] = []
        offsets: list[int] = []
        if not self.probes:
            return tokens, offsets
        depths = {ROOT: 0} | dict(enumerate(self.depths()))
        for probe in self.probes:
            tokens += probe.tokens
            offsets += [depths[probe.node] + ahead for ahead in probe.ahead]
        return tokens, offsets

    @property
    def rows(self) -> int:
        """Of the nodes and the probes."""
        return len(self.tokens) + sum(len(probe.tokens) for probe in self.probes)

    def embedded(self) -> list[tuple[int, Tensor]]:
        """Of the soft rows, the number of each probe's first one (the root's row is 0), and their states."""
        return [(row, probe.soft.states) for row, probe in self._starts() if probe.soft is not None]

    def joins(self) -> list[tuple[int, int, Join]]:
        """Of the soft rows that enter later, the number of each probe's first one, that of its node, and how."""
        softs = [(row, probe.node + 1, probe.soft) for row, probe in self._starts() if probe.soft is not None]
        return [(row, source, soft.join) for row, source, soft in softs if soft.join is not None]

    def _starts(self) -> Iterator[tuple[int, Probe]]:
        """The probes, and the number of the first row of each."""
        row = len(self.tokens) + 1
        for probe in self.probes:
            yield row, probe
            row += len(probe.tokens)

    def heard(self) -> Sequence[int]:
        """Numbers of the rows whose logits are wanted, of the root's, the nodes' and the probes'."""
        if not self.probes:
            return range(len(self.tokens) + 1)
        rows = list(range(len(self.tokens) + 1))
        stop = len(rows)
        for probe in self.probes:
            stop += len(probe.tokens)
            rows += range(stop - probe.heard, stop)
        return rows

    def children(self) -> dict[int, list[int]]:
        """Nodes below each node (and ROOT), in order."""
        below: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            below.setdefault(parent, []).append(node)
        return below

    def path(self, node: int) -> list[int]:
        """Nodes from the root's child down to `node`; empty for ROOT."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def judged(self, came: Sequence[int]) -> list[bool | None]:
        """Whether each node was right, given the tokens that came; None for nodes deeper than those tell."""
        verdicts: list[bool | None] = []
        for token, parent, depth in zip(self.tokens, self.parents, self.depths(), strict=True):
            above = True if parent == ROOT else verdicts[parent]
            verdicts.append(above and (token == came[depth - 1] if depth <= len(came) else None))
        return verdicts

    def mask(self) -> Tensor | None:
        """Boolean [rows, rows]: the root, the nodes, the rows of the probes. Each row sees its ancestors and itself.

        None for a chain without probes, which is plain causal.
        """
        if self.is_chain and not self.probes:
            return None
        count = len(self.tokens) + 1
        mask = torch.eye(1 + self.rows, dtype=torch.bool)
        mask[:count, 0] = True
        for node, parent in enumerate(self.parents):
            mask[node + 1] |= mask[parent + 1]
        for probe in self.probes:
            stop = count + len(probe.tokens)
            mask[count:stop] = mask[probe.node + 1]
            mask[count:stop, count:stop] = True if probe.soft is None else probe.soft.sees
            count = stop
        return mask

    def subset(self, nodes: Sequence[int]) -> Draft:
        """The draft of these nodes alone, in this order; each comes after its parent, which must be among them."""
        number = {ROOT: ROOT} | {node: index for index, node in enumerate(nodes)}
        return Draft(
            [self.tokens[node] for node in nodes],
            [number[self.parents[node]] for node in nodes],
            {number[node]: drawn for node, drawn in self.drawn.items() if node in number},
            [self.estimates[node] for node in nodes] if self.estimates else [],
            self._probes_of(number),
            self.transfer,
            self.trusted,
        )

    def clamped(self, nodes: int, depth: int, vocabulary: int) -> Draft:
        """What is fit for verification: at most so many nodes and levels, ids inside the vocabulary, sound parents.

        Nodes are dropped with everything below them. Sampled siblings are cut only at the end of their draw order:
        dropping one in the middle would change the distribution that the rule assumes.
        """
        depths: list[int] = []
        number: dict[int, int] = {ROOT: ROOT}
        closed: set[int] = set()
        kept = Draft(transfer=self.transfer, trusted=self.trusted)
        for node, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=False)):
            level = 1 if parent == ROOT else depths[parent] + 1 if 0 <= parent < node else depth + 1
            depths.append(level)
            fits = level <= depth and len(kept) < nodes and 0 <= token < vocabulary
            if parent not in number or parent in closed:
                continue
            if not fits:
                if parent in self.drawn:
                    closed.add(parent)
                continue
            number[node] = len(kept)
            kept.tokens.append(token)
            kept.parents.append(number[parent])
            kept.estimates += self.estimates[node : node + 1]
        if len(kept) == len(self.tokens) == len(self.parents):
            return self
        kept.probes = self._probes_of(number)
        kept.drawn = {number[node]: drawn for node, drawn in self.drawn.items() if node in number}
        return kept

    def _probes_of(self, number: Mapping[int, int]) -> list[Probe]:
        """The probes behind nodes that have a new number, and behind ROOT."""
        return [replace(probe, node=number[probe.node]) for probe in self.probes if probe.node in number]
