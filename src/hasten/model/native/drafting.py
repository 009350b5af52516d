"""Whole drafts of small networks, each in one native call: chains of one request, trees of several."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int64
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten.errors import UserError
from hasten.model.decoder import NOT_FINITE, Decoder
from hasten.model.native.backend import parts
from hasten.model.native.library import team
from hasten.model.native.structs import GrowthStruct, SpanStruct, TreeStruct
from hasten.model.rows import SequenceState, Span

if TYPE_CHECKING:
    from hasten.model.native.linear import Panels


@torch.inference_mode()
def chain(
    model: Decoder,
    sequence: SequenceState,
    token: int,
    position: int,
    vocabulary: int,
    most: int,
    confidence: float,
) -> list[tuple[int, float]]:
    """A greedy draft: what follows `token` in a sequence, token by token; for models that `runs` says yes of.

    Args:
        sequence: its committed rows stand before `token`, in plain memory; the chain's rows are left pending.
        token, position: the chain's first row.
        vocabulary: tokens that may be chosen, from 0 on.
        most: how many to draft.
        confidence: the chain ends when all of it together has less probability.

    Returns:
        Tokens and their probabilities.

    Raises:
        IndexError: the embedding does not have `token`.
        UserError: logits that are not finite.
    """
    loaded, backend, described = parts(model)
    sequence.begin(torch.arange(position, position + most))
    span, plain = backend.span(described, Span(sequence, 0, 1), 1, None)
    assert plain
    tokens, probabilities = (c_int64 * most)(), (c_float * most)()
    count = loaded.hasten_chain(
        *(ctypes.addressof(described), team(), ctypes.addressof(span), token, position, vocabulary),
        *(most, confidence, ctypes.addressof(tokens), ctypes.addressof(probabilities)),
    )
    if count < 0:
        raise IndexError(f"token id {token} is not below {model.embedding.shape[0]}, the size of the vocabulary")
    if count and isnan(probabilities[count - 1]):
        raise UserError(NOT_FINITE)
    return list(zip(tokens[:count], probabilities[:count], strict=True))


@dataclass(frozen=True)
class Growth:
    """How trees grow (EAGLE-2, 2406.16858, section 4): the likeliest nodes of a level are read, all trees' in one pass.

    A node is read as what its parent's row gave, with its own token beside it.

    Attributes:
        fusion: where the token's embedding and that output, side by side, are made one (EAGLE-1).
        entrance: float32 [hidden], of a norm that outputs enter by.
        words: int64 [words], the tokens that the network's head says; None where it is their numbers.
        width, ranks: nodes of a level that are read, at most, and children of each.
        least: a level is read where its nodes' chances come to so much together.
    """

    fusion: Panels | None
    entrance: Tensor | None
    words: Tensor | None
    width: int
    ranks: int
    least: float


@dataclass(frozen=True)
class Root:
    """Where a request's tree begins.

    Attributes:
        sequence: its committed rows stand before the tree, in plain memory; the tree's rows are left pending.
        state: [hidden], what the network made of the last of these.
        position: of that row.
        nodes, depth: of the tree, at most; 1 or more.
        closed: tokens below which nothing stands.
    """

    sequence: SequenceState
    state: Tensor
    position: int
    nodes: int
    depth: int
    closed: Sequence[int]


@dataclass(frozen=True)
class Grown:
    """The likeliest nodes of a tree, each behind its parent.

    Attributes:
        tokens, parents: of each; -1 is the parent of the first ones.
        chances: the products of their paths' probabilities.
    """

    tokens: list[int]
    parents: list[int]
    chances: list[float]


@torch.inference_mode()
def grow(model: Decoder, growth: Growth, roots: Sequence[Root]) -> list[Grown]:
    """The trees of some requests; of models that `runs` says yes of, whose layers have no windows."""
    loaded, backend, described = parts(model)
    spans, trees = (SpanStruct * len(roots))(), (TreeStruct * len(roots))()
    states = torch.stack([root.state for root in roots]).float()
    kept = []
    for number, root in enumerate(roots):
        rows = growth.width * (root.depth - 1)
        root.sequence.begin(torch.full((rows,), root.position + 1))
        spans[number], plain = backend.span(described, Span(root.sequence, 0, rows), rows, None)
        assert plain
        closed = (c_int64 * len(root.closed))(*root.closed)
        tokens, parents, chances = (c_int64 * root.nodes)(), (c_int64 * root.nodes)(), (c_double * root.nodes)()
        kept.append((closed, tokens, parents, chances))
        trees[number] = TreeStruct(
            span=ctypes.addressof(spans[number]),
            state=states[number].data_ptr(),
            position=root.position,
            most=root.nodes,
            depth=root.depth,
            closed_count=len(closed),
            closed=ctypes.addressof(closed),
            tokens=ctypes.addressof(tokens),
            parents=ctypes.addressof(parents),
            estimates=ctypes.addressof(chances),
        )
    struct = GrowthStruct(
        fusion=None if growth.fusion is None else ctypes.addressof(growth.fusion.struct),
        entrance=None if growth.entrance is None else growth.entrance.data_ptr(),
        words=None if growth.words is None else growth.words.data_ptr(),
        width=growth.width,
        ranks=growth.ranks,
        least=growth.least,
    )
    places = ctypes.addressof(described), team(), ctypes.addressof(struct)
    loaded.hasten_grow(*places, len(trees), ctypes.addressof(trees))
    return [
        Grown(tokens[: tree.count], parents[: tree.count], chances[: tree.count])
        for tree, (_, tokens, parents, chances) in zip(trees, kept, strict=True)
    ]
