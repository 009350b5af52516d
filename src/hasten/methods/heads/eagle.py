"""EAGLE-1, -2 and -3: one layer reads the target's states of the whole text, and drafts on its own outputs.

"EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty", 2024, arXiv 2401.15077; "EAGLE-2: Faster
Inference of Language Models with Dynamic Draft Trees", 2024, arXiv 2406.16858; "EAGLE-3: Scaling up Inference
Acceleration of Large Language Models via Training-Time Test", 2025, arXiv 2503.01840. What comes next but one depends
on which token was chosen, so a row is a state and the token behind it. EAGLE-1's layer makes the next final state of
them, which the target's own head turns into words. That of EAGLE-3 reads states of three depths, and is trained to say
words right away. `hasten train eagle` makes either. Exactness: lossless, greedy and sampling (deterministic children,
one draw of the target's per node).

- *Tree* (EAGLE-2, section 4). A level's likeliest nodes are read in one pass, whatever they are below, and each has
  children. In the end the likeliest of all nodes make the draft; a child is never likelier than what it is below.
- *What is not grown.* A node that is less likely than all of a draft's nodes would be has no child among them. And
  where a level's nodes are together unlikely (`least`), another pass is not worth its time.
- *Vocabulary.* Heads may say only the frequent tokens (`d2t`), EAGLE-1's too, by those rows of the target's head.
- *Beams* are narrower than on a GPU, where ten rows take as long as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hasten.engine import ROOT, Draft, Request, Target, register
from hasten.errors import UserError
from hasten.methods.drafters.drawing import Child
from hasten.methods.drafters.sequences import Branches
from hasten.methods.heads.context import ContextDrafter
from hasten.methods.heads.eagle_format import EagleWeights
from hasten.methods.heads.eagle_network import EagleNetwork
from hasten.methods.heads.guesses import Guesses, Place
from hasten.methods.heads.head import FINAL, own_head, require_decoder
from hasten.methods.heads.sizing import Sizing
from hasten.model import Span
from hasten.model.native.drafting import Growth, Root, grow
from hasten.model.taps import Site


@dataclass(frozen=True)
class EagleParameters:
    """Parameters.

    Attributes:
        head: the folder of the head; by default that beside the target.
        nodes: of the tree, at most.
        sized: whether only those are verified that pay on this machine.
        depth: of the tree, at most.
        beam: nodes of a level that are read, and children of each.
        least: a level is read where its nodes' probabilities sum to that much.
        tree: `dynamic` (EAGLE-2), or `chain`, each token below the one before.
        site: whether a configuration's numbers of layers say whose `input`s are read, or whose `output`s.

    Raises:
        UserError: out of range.
    """

    head: str = ""
    nodes: int = 10
    sized: bool = True
    depth: int = 5
    beam: int = 4
    least: float = 0.2
    tree: str = "dynamic"
    site: str = "input"

    def __post_init__(self) -> None:
        for name, most in (("nodes", 64), ("depth", 16), ("beam", 16)):
            if not 1 <= getattr(self, name) <= most:
                raise UserError(f"eagle: {name} must be between 1 and {most}")
        if not 0 <= self.least <= 1:
            raise UserError("eagle: least must be between 0 and 1")
        for name, known in (("tree", ("dynamic", "chain")), ("site", ("input", "output"))):
            if getattr(self, name) not in known:
                raise UserError(f"eagle: {name} must be {' or '.join(known)}, not {getattr(self, name)!r}")

    @property
    def width(self) -> int:
        """Nodes of a level that are read."""
        return self.beam if self.tree == "dynamic" else 1


class Growing:
    """The tree of one request.

    Args:
        request: the draft's.
        parameters: of the method.
        nodes: at most.
        closed: tokens below which nothing stands.

    Attributes:
        all: nodes, those included that the draft will not have.
        frontier: nodes whose rows are read next; at first the root's was.
        outputs: of each node's parent, by the parent.
    """

    def __init__(self, request: Request, parameters: EagleParameters, nodes: int, closed: frozenset[int]) -> None:
        self.request, self.closed = request, closed
        self._width, self._least, self._most = parameters.width, parameters.least, min(nodes, parameters.nodes)
        self._left = min(parameters.depth, request.stopper.left - 1)
        self.all = Draft()
        self._depths: list[int] = []
        self._branches = Branches()
        self.outputs: dict[int, Tensor] = {}
        self.frontier: list[int] = [ROOT]

    def places(self) -> list[Place]:
        """Where the frontier's nodes have their children."""
        depths = [0 if node == ROOT else self._depths[node] for node in self.frontier]
        return [Place(self.request, node, depth) for node, depth in zip(self.frontier, depths, strict=True)]

    def grow(self, outputs: Tensor, children: Sequence[Sequence[Child]]) -> None:
        """Give the frontier's nodes children, and choose the next frontier.

        Args:
            outputs: the network's, [frontier, hidden].
            children: of each one.
        """
        tree, first = self.all, len(self.all)
        for row, parent in enumerate(self.frontier):
            self.outputs[parent] = outputs[row]
            above, depth = (1.0, 0) if parent == ROOT else (tree.estimates[parent], self._depths[parent])
            for word, chance in children[row]:
                tree.tokens.append(word)
                tree.parents.append(parent)
                # Rounding must not make a child likelier than its parent.
                tree.estimates.append(above * min(1.0, chance))
                self._depths.append(depth + 1)
        self._left -= 1
        self.frontier = self._chosen(range(first, len(tree))) if self._left > 0 else []

    def _chosen(self, fresh: Sequence[int]) -> list[int]:
        """The likeliest of a level's nodes that may have a child in the draft; none where that is not worth it."""
        chances = self.all.estimates
        ranked = sorted(chances, reverse=True)
        bar = ranked[self._most - 1] if len(ranked) >= self._most else 0.0
        open_ = [node for node in fresh if self.all.tokens[node] not in self.closed and chances[node] > bar]
        best = sorted(open_, key=lambda node: -chances[node])[: self._width]
        return sorted(best) if sum(chances[node] for node in best) >= self._least else []

    def mask(self) -> Tensor | None:
        """What the frontier's rows see of the rows that were read before."""
        return self._branches.feed(self.frontier, self.all.parents)

    def row(self, node: int) -> tuple[int, Tensor, int]:
        """A node's token, what its parent's row gave, and its position behind that of the text's last row."""
        return self.all.tokens[node], self.outputs[self.all.parents[node]], self._depths[node]

    def draft(self) -> Draft:
        """The likeliest nodes; of two that are as likely the one that is not as deep, so that none lacks its parent."""
        chances = self.all.estimates
        order = sorted(range(len(chances)), key=lambda node: (-chances[node], self._depths[node], node))
        return self.all.subset(sorted(order[: self._most]))


@register(
    "eagle",
    family="heads",
    exactness="lossless",
    paper="2503.01840",
    title="EAGLE-1/2/3: a layer drafts trees on target's states",
    parameters=EagleParameters,
    needs_training=True,
    command="hasten train eagle --model MODEL",
    defaults=own_head("eagle"),
)
class Eagle(ContextDrafter):
    """A tree per request, grown level by level, all requests' in one pass.

    Raises:
        UserError: no head, or one for another target.
    """

    def __init__(self, target: Target, parameters: EagleParameters) -> None:
        model, self.parameters = require_decoder(target, "eagle"), parameters
        if not parameters.head:
            raise UserError("eagle needs a head for this model: `hasten train eagle --model MODEL` makes one")
        weights = EagleWeights.load(Path(parameters.head), model.config)
        site: Site = "input" if parameters.site == "input" else "output"
        self.taps = (FINAL,) if weights.version == 1 else tuple((site, layer) for layer in weights.taps)
        self.eagle, self._end_ids = EagleNetwork(model, weights), target.end_ids
        self._growth = self.eagle.growth(parameters.width, parameters.least)
        sizing = Sizing(target) if parameters.sized else None
        super().__init__(model, self.eagle.decoder, self.eagle.own_bytes, Guesses(self.eagle.words), sizing)

    def enter(self, states: Tensor, tokens: Tensor) -> Tensor:
        return self.eagle.enter(states, tokens)

    def draft(self, requests: Sequence[Request], states: Tensor, budgets: Sequence[int]) -> list[Draft]:
        if self._growth is not None and not self.guesses.noisy:
            return self._grown(self._growth, requests, states, budgets)
        trees = [
            Growing(request, self.parameters, budget, frozenset(request.params.endings(self._end_ids)))
            for request, budget in zip(requests, budgets, strict=True)
        ]
        growing, outputs = trees, states
        while growing:
            places = [place for tree in growing for place in tree.places()]
            children = self.guesses.behind(places, self.network.logits(outputs, None), self.parameters.width)
            stop = 0
            for tree in growing:
                start, stop = stop, stop + len(tree.frontier)
                tree.grow(outputs[start:stop], children[start:stop])
            growing = [tree for tree in growing if tree.frontier]
            outputs = self._expand(growing) if growing else outputs
        for tree in trees:
            self.guesses.made(tree.request, tree.all)
        return [tree.draft() for tree in trees]

    def _grown(
        self, growth: Growth, requests: Sequence[Request], states: Tensor, budgets: Sequence[int]
    ) -> list[Draft]:
        """The same trees, in one native call."""
        roots = [
            Root(
                self.sequence(request),
                state,
                len(request.tokens) - 2,
                min(budget, self.parameters.nodes),
                max(1, min(self.parameters.depth, request.stopper.left - 1)),
                list(request.params.endings(self._end_ids)),
            )
            for request, state, budget in zip(requests, states, budgets, strict=True)
        ]
        return [Draft(tree.tokens, tree.parents, estimates=tree.chances) for tree in grow(self.network, growth, roots)]

    def _expand(self, trees: Sequence[Growing]) -> Tensor:
        """The network's outputs for all frontiers' nodes, whose rows stay pending."""
        tokens: list[int] = []
        above: list[Tensor] = []
        positions: list[int] = []
        spans: list[Span] = []
        for tree in trees:
            start, last = len(tokens), len(tree.request.tokens) - 2
            for token, output, depth in map(tree.row, tree.frontier):
                tokens.append(token)
                above.append(output)
                positions.append(last + depth)
            spans.append(self.span(tree.request, start, len(tokens), tree.mask()))
        beside = torch.tensor(tokens, device=self.network.device)
        return self.advance(self.eagle.enter_again(torch.stack(above), beside), beside, positions, spans)

    def scratch_bytes(self, requests: Sequence[Request], nodes: int) -> int:
        if not requests or nodes < 1:
            return 0
        width, depth = self.parameters.width, self.parameters.depth
        rows, words = len(requests) * width, self.network.head.out_features
        # A level's outputs are kept until the tree is whole.
        level = self.guesses.scratch_bytes(rows, words) + depth * rows * self._last_bytes
        slots = max(len(request.tokens) for request in requests) + width * depth
        growing = level + self.pass_bytes(rows, width * depth, slots)
        return max(super().scratch_bytes(requests, nodes), growing)
