"""Which rows of a step to spend on guesses, and which on prompts behind them, that make the next step's guesses.

PPD, 2405.18628, section 3.2 ("dynamic sparse tree"): a node gets prompts by how likely it is that the step ends there.
The paper prunes trees offline, one for each number of prompts that the last node had. Here it is decided at every step,
by what the guesses of this very step promise. Every row is an offer: a guess brings the probability that it is right, a
prompt what it lets the next step gain times the probability that the step ends at its node. Offers are taken, the best
ones first, as far as they bring more than they cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hasten.engine import ROOT
from hasten.methods.heads.tree import best_paths

Offer = tuple[float, int, int]
"""What a row brings, its node, and which of the node's prompts it is; 0 is the node itself."""
GUESSES = 16
"""Nodes of a tree by which prompts are judged."""


@dataclass(frozen=True)
class Allotment:
    """`nodes`: those to verify, ascending. `prompts`: how many stand behind the root, and behind each of them."""

    nodes: list[int]
    prompts: list[int]


def gains(accuracy: Sequence[Sequence[float]]) -> list[float]:
    """Tokens that a step gains by the first prompt, the second, and so on: falling.

    Args:
        accuracy: per prompt, how often each rank is right.
    """
    whole = best_paths(accuracy, GUESSES)
    found = [sum(worth for worth, path in whole if len(path) == level + 1) for level in range(len(accuracy))]
    return [min(found[: level + 1]) for level in range(len(found))]


def allot(
    probabilities: Sequence[float],
    parents: Sequence[int],
    gains: Sequence[float],
    price: Callable[[int], float],
    most: int,
    width: int = 1,
) -> Allotment:
    """The rows of a step that bring most.

    Args:
        probabilities: that each node of a tree is accepted; none above its parent's.
        parents: of the nodes.
        gains: as `gains` says.
        price: tokens that a step of so many rows costs.
        most: rows, the root's included.
        width: rows of a prompt.
    """
    everything = list(range(len(probabilities)))
    guesses = [(probability, node, 0) for node, probability in enumerate(probabilities)]
    offers = guesses + _prompts(everything, probabilities, parents, gains)
    nodes = sorted(node for _, node, prompt in _best(offers, price, 1, most, width) if not prompt)
    # Where a step ends depends on the nodes that are left.
    offers = _prompts(nodes, probabilities, parents, gains)
    number = {node: place for place, node in enumerate([ROOT, *nodes])}
    prompts = [0] * len(number)
    for _, node, _ in _best(offers, price, 1 + len(nodes), most, width):
        prompts[number[node]] += 1
    return Allotment(nodes, prompts)


def _prompts(
    nodes: Sequence[int], probabilities: Sequence[float], parents: Sequence[int], gains: Sequence[float]
) -> list[Offer]:
    """Of all prompts behind some nodes and the root."""
    ends = {ROOT: 1.0} | {node: probabilities[node] for node in nodes}
    for node in nodes:
        ends[parents[node]] -= probabilities[node]
    return [(max(end, 0.0) * gain, node, place) for node, end in ends.items() for place, gain in enumerate(gains, 1)]


def _best(offers: Sequence[Offer], price: Callable[[int], float], rows: int, most: int, width: int) -> list[Offer]:
    """The offers, beside so many rows, that bring most less what they cost."""
    order = sorted(offers, key=lambda offer: (-offer[0], offer[2] > 0, offer[1:]))
    brought, best, count = 0.0, -price(rows), 0
    for place, (worth, _, prompt) in enumerate(order, 1):
        rows += width if prompt else 1
        if rows > most:
            break
        brought += worth
        if brought - price(rows) > best:
            best, count = brought - price(rows), place
    return order[:count]
