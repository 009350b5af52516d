"""Which tokens the rows of a step choose: one call for all requests, on the thread that asks.

A *walk* goes from a draft's root down, as long as a node has the token that its parent's row chooses: only rows that
are reached are looked at. A single row is a walk without nodes. Rows choose in C++ (`native/sample.cpp`), or in NumPy
where that was not built. Neither uses a team of threads, which would wait for a core wherever another process has one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.engine.sampling.native.library import WALK, library
from hasten.engine.sampling.plainly import choice
from hasten.engine.sampling.rule import Rule

BLOCK = 256
"""Tokens of whose logits the largest one is noted, as in `sample.cpp`."""
FLOAT, CANDIDATE = 4, 8
"""Bytes of a number, and of a token with its score."""


@dataclass(frozen=True)
class Walk:
    """One request's.

    Attributes:
        rule: how a row chooses.
        logits: float32 [nodes + 1 or more, vocabulary]: the root's, then a row per node.
        position: absolute, of the token that the root chooses.
        tokens, parents: of the nodes, as in a draft.
        above: uncommitted tokens before the one that the root chooses.
        allowed: tokens that a grammar allows behind each row, [nodes + 1, bytes], one bit each, lowest bit first.
    """

    rule: Rule
    logits: Tensor
    position: int
    tokens: Sequence[int] = ()
    parents: Sequence[int] = ()
    above: Sequence[int] = ()
    allowed: NDArray[np.uint8] | None = None


class Outcome(NamedTuple):
    """`path`: nodes that were chosen, from the root's child down. `token`: what the last of these rows chooses."""

    path: list[int]
    token: int


def descend(walks: Sequence[Walk]) -> list[Outcome]:
    """What comes of walks over one vocabulary; of rows that are not finite, any token."""
    if not walks:
        return []
    loaded = library()
    logits = [_on_cpu(walk.logits) for walk in walks]
    if loaded is None:
        return [_step_by_step(walk, rows.numpy()) for walk, rows in zip(walks, logits, strict=True)]
    return _natively(loaded, walks, logits)


def scratch_bytes(rule: Rule, vocabulary: int) -> int:
    """That choosing takes for a while, however many rows there are."""
    return FLOAT * (_blocks(vocabulary) + vocabulary) + (CANDIDATE * vocabulary if rule.filters else 0)


def _blocks(vocabulary: int) -> int:
    return -(-vocabulary // BLOCK)


def _on_cpu(logits: Tensor) -> Tensor:
    """As they are, if their rows can be read in place."""
    logits = logits.cpu()
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _natively(loaded: ctypes.CDLL, walks: Sequence[Walk], logits: Sequence[Tensor]) -> list[Outcome]:
    vocabulary = logits[0].shape[1]
    paths: list[NDArray[np.int64]] = []
    kept: list[NDArray[np.int64]] = []

    def address(numbers: Sequence[int]) -> int:
        if not numbers:
            return 0
        kept.append(np.array(numbers, np.int64))
        return kept[-1].ctypes.data

    records = []
    for walk, rows in zip(walks, logits, strict=True):
        paths.append(np.empty(len(walk.tokens), np.int64))
        allowed = (0, 0) if walk.allowed is None else (walk.allowed.shape[1], walk.allowed.ctypes.data)
        records.append(
            (
                *(walk.rule.address, rows.data_ptr(), rows.stride(0), walk.position, len(walk.tokens), len(walk.above)),
                *(allowed[0], address(walk.tokens), address(walk.parents), address(walk.above), allowed[1]),
                *(paths[-1].ctypes.data, 0, 0),
            )
        )
    table = np.array(records, WALK)
    ranked = any(walk.rule.filters for walk in walks)
    maxima, scores = (torch.empty(count) for count in (_blocks(vocabulary), vocabulary))
    candidates = torch.empty(vocabulary if ranked else 0, dtype=torch.int64)
    loaded.hasten_sample(
        *(table.ctypes.data, len(table), vocabulary),
        *(maxima.data_ptr(), scores.data_ptr(), candidates.data_ptr()),
    )
    return [
        Outcome(path[:length].tolist(), token)
        for path, length, token in zip(paths, table["length"].tolist(), table["token"].tolist(), strict=True)
    ]


def _step_by_step(walk: Walk, logits: NDArray[np.float32]) -> Outcome:
    path: list[int] = []
    node = -1
    while True:
        above = [*walk.above, *(walk.tokens[each] for each in path)]
        allowed = None if walk.allowed is None else walk.allowed[node + 1]
        token = choice(walk.rule, logits[node + 1], walk.position + len(path), above, allowed)
        children = (each for each, parent in enumerate(walk.parents) if parent == node and walk.tokens[each] == token)
        found = next(children, None)
        if found is None:
            return Outcome(path, token)
        path.append(found)
        node = found
