"""Which part of a draft is kept, and the one token that is added: the acceptance rules.

Greedy and `match`: the target chooses a token at each node (its argmax, or its keyed Gumbel draw) and the walk
descends while a child has that token; the output is what plain decoding would give (rule A with shared noise).
`max`, where a draft has sampled nodes: Leviathan et al. 2211.17192 and Chen et al. 2302.01318 for a sampled child
(rule B), SpecInfer 2305.09781 for several drawn with replacement (C), Sequoia 2402.12374 without (D); deterministic
children are one-hot rounds of the same recursion. A draft without sampled nodes is matched (A), which accepts as often.
`typical`: Medusa 2401.10774, section 2.3.1; lossy. `transfer`: RAPID 2502.20330, section 3.2; lossy. `trust`: LUD
2405.15208; lossy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.engine.drafting.draft import ROOT, Draft, Drawn
from hasten.engine.sampling.noise import Uniforms
from hasten.engine.sampling.params import SamplingParams
from hasten.engine.sampling.sampler import draw

TAIL = 0.1
"""Share of a drafter's largest probability below which its tokens say nothing to the target."""


@dataclass
class Verdict:
    """`path`: accepted nodes from the root's child down. `token`: the target's own next token."""

    path: list[int]
    token: int


def match(draft: Draft, chosen: list[int]) -> Verdict:
    """Descend while a child has its parent's choice; `chosen[i + 1]` is node i's choice, `chosen[0]` the root's."""
    below = draft.children()
    node = ROOT
    path: list[int] = []
    while True:
        token = chosen[node + 1]
        child = next((child for child in below.get(node, ()) if draft.tokens[child] == token), None)
        if child is None:
            return Verdict(path, token)
        path.append(child)
        node = child


def reject(draft: Draft, target: Callable[[int], Tensor], coins: Uniforms) -> Verdict:
    """The residual recursion over each node's children, rules B, C and D.

    Args:
        target: node (or ROOT) to its processed distribution, float64 [vocabulary]; asked for visited nodes only.
        coins: uniforms of this request and step.
    """
    below = draft.children()
    node = ROOT
    path: list[int] = []
    while True:
        residual = target(node)
        accepted = None
        drawn = draft.drawn.get(node)
        proposal = None
        if drawn is not None:
            proposal = _proposal(drawn, residual)
        tried: set[int] = set()
        for rank, child in enumerate(below.get(node, ())):
            token = draft.tokens[child]
            if proposal is None or (drawn is not None and drawn.count is not None and rank >= drawn.count):
                # A deterministic child is a proposal that always is this token; a repeated one says nothing new.
                if token in tried:
                    continue
                tried.add(token)
                if coins.draw() < float(residual[token]):
                    accepted = child
                    break
                residual = residual.clone()
                residual[token] = 0
            else:
                if coins.draw() * float(proposal[token]) < float(residual[token]):
                    accepted = child
                    break
                residual = (residual - proposal).clamp(min=0)
                if drawn is not None and not drawn.replacement:
                    proposal = proposal.clone()
                    proposal[token] = 0
                    proposal /= proposal.sum().clamp(min=torch.finfo(proposal.dtype).tiny)
            mass = float(residual.sum())
            # Rounding can leave nothing: then target and proposal agree, and the target itself is right.
            residual = residual / mass if mass > 0 else target(node)
            if mass <= 0 or (proposal is not None and float(proposal.sum()) <= 0):
                break
        if accepted is None:
            return Verdict(path, draw(residual, coins.draw()))
        path.append(accepted)
        node = accepted


def typical(draft: Draft, target: Callable[[int], Tensor], coins: Uniforms, params: SamplingParams) -> Verdict:
    """Keep the longest path of typical tokens, ties by summed log-probability; the next token is drawn as usual.

    The root's child must be the target's own draw, so that the first token is never lossy.
    """
    distributions: dict[int, Tensor] = {}

    def at(node: int) -> Tensor:
        if node not in distributions:
            distributions[node] = target(node)
        return distributions[node]

    first = draw(at(ROOT), coins.draw())
    score: dict[int, tuple[int, float]] = {}
    for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        if parent == ROOT:
            if token == first and not score:
                score[node] = (1, 0.0)
            continue
        if parent not in score:
            continue
        p = at(parent)
        entropy = -float(torch.special.xlogy(p, p).sum())
        threshold = min(params.typical_epsilon, params.typical_delta * float(torch.exp(torch.tensor(-entropy))))
        if float(p[token]) > threshold:
            length, total = score[parent]
            score[node] = (length + 1, total + float(p[token].log()))
    if not score:
        return Verdict([], first)
    best = max(score, key=lambda node: score[node])
    return Verdict(draft.path(best), draw(at(best), coins.draw()))


def transfer(draft: Draft, target: Callable[[int], Tensor], coins: Uniforms, greedy: bool) -> Verdict:
    """A chain against the target's distribution moved towards the drafter's, by `draft.transfer` (eta).

    A token x is accepted with probability min(1, p'(x) / q(x)), p' = `moved`; behind a rejected one the next token
    comes from max(p - min(p', q), 0). What comes out is min(q, p') + (1 - sum min(q, p')) times the latter, normalised:
    p where eta is 0. Greedily (the paper says nothing), a token is accepted if it is the likeliest by p'.

    Args:
        target: node (or ROOT) to its processed distribution p, float64 [vocabulary]; asked for visited nodes only.
        coins: uniforms of this request and step.
    """
    below = draft.children()
    node, path = ROOT, list[int]()
    while True:
        p, drawn, children = target(node), draft.drawn.get(node), below.get(node, ())
        if drawn is None or not children:
            return Verdict(path, int(p.argmax()) if greedy else draw(p, coins.draw()))
        q = _proposal(drawn, p)
        hat, token = moved(p, q, draft.transfer), draft.tokens[children[0]]
        if greedy:
            best = int(hat.argmax())
            if best != token:
                return Verdict(path, best)
        elif coins.draw() * float(q[token]) >= float(hat[token]):
            residual = (p - torch.minimum(hat, q)).clamp(min=0)
            return Verdict(path, draw(residual if float(residual.sum()) > 0 else p, coins.draw()))
        node = children[0]
        path.append(node)


def trust(draft: Draft, chosen: Callable[[list[int]], int]) -> Verdict:
    """All of a chain, whatever the target says, and behind it the target's own choice.

    Args:
        chosen: that choice, given the tokens before it.
    """
    return Verdict(list(range(len(draft))), chosen(draft.tokens))


def moved(p: Tensor, q: Tensor, eta: float) -> Tensor:
    """softmax(log p + eta (q - p)): a step of distillation on the target's logits (RAPID, equation 6).

    All are float64 [vocabulary]. Tokens whose q is below a share of its largest stay where they are, as in the
    authors' program.
    """
    shift = torch.where(q >= TAIL * q.max(), eta * (q - p), 0.0)
    return torch.softmax(p.log() + shift, 0)


def _proposal(drawn: Drawn, like: Tensor) -> Tensor:
    """What a node's children were drawn from, over the whole vocabulary; a tensor of its own."""
    if drawn.ids is None:
        return drawn.probabilities.clone()
    return torch.zeros_like(like).index_add_(0, drawn.ids, drawn.probabilities)
