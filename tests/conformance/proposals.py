"""Drafts for the rejection rules, drawn from tables: chains and trees, sampled, deterministic and mixed."""

from __future__ import annotations

from laws import Propose
from torch import Tensor

from hasten.engine import ROOT, Draft, Drawn
from hasten.engine.sampling import sampler
from hasten.engine.sampling.noise import Uniforms
from helpers import add


def draw_children(draft: Draft, node: int, q: Tensor, count: int, coins: Uniforms, replacement: bool) -> list[int]:
    """Sample children of a node, say so in the draft, and return their numbers."""
    draft.drawn[node] = Drawn(q, replacement=replacement)
    rest, nodes = q.clone(), []
    for _ in range(count):
        if float(rest.sum()) <= 0:
            break
        token = sampler.draw(rest, coins.draw())
        nodes.append(add(draft, token, node))
        if not replacement:
            rest[token] = 0
    return nodes


def sampled(table: Tensor, widths: tuple[int, ...], replacement: bool = True, stop: float = 0.0) -> Propose:
    """A tree of `widths[level]` children per node drawn from `table`; branches end behind tokens below `stop`."""

    def propose(context: tuple[int, ...], coins: Uniforms) -> Draft:
        draft = Draft()
        level = [(ROOT, context)]
        for width in widths:
            below = []
            for node, above in level:
                q = table[above[-2], above[-1]]
                for child in draw_children(draft, node, q, width, coins, replacement):
                    token = draft.tokens[child]
                    if q[token] >= stop:
                        below.append((child, (*above, token)))
            level = below
        return draft

    return propose


def likeliest(table: Tensor, widths: tuple[int, ...]) -> Propose:
    """A deterministic tree of the likeliest tokens."""

    def propose(context: tuple[int, ...], coins: Uniforms) -> Draft:
        draft = Draft()
        level = [(ROOT, context)]
        for width in widths:
            level = [
                (add(draft, token, node), (*above, token))
                for node, above in level
                for token in table[above[-2], above[-1]].topk(width).indices.tolist()
            ]
        return draft

    return propose


def drawn_above_likeliest(table: Tensor) -> Propose:
    def propose(context: tuple[int, ...], coins: Uniforms) -> Draft:
        draft = Draft()
        for child in draw_children(draft, ROOT, table[context[-2], context[-1]], 2, coins, False):
            for token in table[context[-1], draft.tokens[child]].topk(2).indices.tolist():
                add(draft, token, child)
        return draft

    return propose


def likeliest_above_drawn(above: Tensor, below: Tensor) -> Propose:
    def propose(context: tuple[int, ...], coins: Uniforms) -> Draft:
        draft = Draft()
        for token in above[context[-2], context[-1]].topk(2).indices.tolist():
            child = add(draft, token, ROOT)
            draw_children(draft, child, below[context[-1], token], 2, coins, True)
        return draft

    return propose


def lookup_beside_sample(table: Tensor) -> Propose:
    """Two sampled children, and deterministic siblings after them: one of them was perhaps drawn, too."""
    last = table.shape[-1] - 1

    def propose(context: tuple[int, ...], coins: Uniforms) -> Draft:
        draft = Draft()
        q = table[context[-2], context[-1]]
        draw_children(draft, ROOT, q, 2, coins, False)
        draft.drawn[ROOT] = Drawn(q, replacement=False, count=2)
        for token in (last, last, context[-1]):
            draw_children(draft, add(draft, token, ROOT), table[context[-1], token], 1, coins, True)
        return draft

    return propose


def sparse(table: Tensor) -> Propose:
    """Drawn from all tokens but the unlikeliest two, with their ids."""

    def propose(context: tuple[int, ...], coins: Uniforms) -> Draft:
        draft = Draft()
        values, ids = table[context[-2], context[-1]].topk(table.shape[-1] - 2)
        q = values / values.sum()
        for _ in range(2):
            add(draft, int(ids[sampler.draw(q, coins.draw())]), ROOT)
        draft.drawn[ROOT] = Drawn(q, ids)
        return draft

    return propose
