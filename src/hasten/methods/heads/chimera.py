"""Chimera: a light model of its own that estimates the states which the target has not computed yet.

"Chimera: A Lossless Decoding Method for Accelerating Large Language Models Inference by Fusing all Tokens", 2024,
arXiv 2402.15758. A *trigram encoder*, two matrices on the embeddings of three tokens, stands for the target's lower
layers; a *full-context encoder*, one layer with a cache of its own, stands for its upper ones. To that layer a position
is two rows: h, the target's final state, and g, what the trigram encoder makes of the tokens up to there. The row of g
at position p sees the states before p and every g up to its own; what it becomes, o, estimates the target's state at p.
Head k reads the last state that the target did compute and the estimate at the k-th token behind it, and says the token
that follows. `hasten train chimera` makes the weights. Exactness: lossless, greedy and sampling (deterministic
children, one draw of the target's per node).

Decisions where the paper leaves room, or where its code does something else:

- *Deeper levels* see what the first one sees, with estimates in the place of states: rows o at positions whose token is
  drafted, and g of the path's tokens beside them. The authors' code hides the estimates by its mask, and the real g by
  leaving them out.
- *Tree.* Every node that is worth growing has a row of its own, below its own path; the most probable nodes make the
  tree. `tree=static` takes the rates that were measured in place of the heads' own probabilities, which gives the
  paper's: one tree for all steps.
- *Heads.* What the state adds to the estimate is a matrix [hidden, hidden], zero at first, and one head of frequent
  words reads the sum at all levels: `W (o + A h)` for `H [h; o]`, four of which would be larger than a small target.
- *Verification.* By the acceptance rules of all drafters; the authors' evaluation has typical acceptance, which is
  lossy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from hasten.engine import ROOT, Draft, Request, Target, register
from hasten.errors import UserError
from hasten.methods.drafters.sequences import Branches
from hasten.methods.heads.chimera_model import ChimeraModel, trigram
from hasten.methods.heads.chimera_weights import TRIGRAM, ChimeraWeights
from hasten.methods.heads.context import ContextDrafter, behind
from hasten.methods.heads.guesses import Guesses, Place
from hasten.methods.heads.head import FINAL, own_head, require_decoder
from hasten.methods.heads.parameters import GrowingParameters
from hasten.methods.heads.sizing import Sizing
from hasten.methods.heads.tree import Expansion, at_rates
from hasten.model import Span
from hasten.model.config import Slots
from hasten.model.taps import Site


@dataclass(frozen=True)
class ChimeraParameters(GrowingParameters):
    """Those of all trees that grow. By default fewer nodes do: each level is a pass of the network."""

    slug: ClassVar[str] = "chimera"

    width: int = 4
    least: float = 0.2


class Growing:
    """A request's tree while it grows, and its rows: of each node that is read its g, and its estimate when the first
    of its children is read.

    Args:
        request: the draft's.
        nodes: of the tree, at most.

    Attributes:
        estimates: [hidden], at each node that was read, and at the root.
    """

    def __init__(self, request: Request, nodes: int) -> None:
        self.request, self.tree = request, Expansion(nodes)
        self.estimates: dict[int, Tensor] = {}
        self._branches = Branches()

    def trigram(self, node: int) -> list[int]:
        """The last tokens of its path."""
        draft = self.tree.all
        return trigram([*self.request.tokens[-TRIGRAM:], *(draft.tokens[each] for each in draft.path(node))])

    def parents(self, nodes: Sequence[int]) -> list[int]:
        """Whose estimates are read before these nodes, all of one level."""
        return sorted({self.tree.all.parents[node] for node in nodes})

    def mask(self, nodes: Sequence[int]) -> Tensor | None:
        """What the rows of these nodes' parents, and then theirs, see of the pending ones.

        A path's rows stand in turns: the root's estimate is row 0, the g of node n is row 2n + 1, its estimate 2n + 2.
        """
        above = [ROOT]
        for node, parent in enumerate(self.tree.all.parents):
            above += (2 * (parent + 1), 2 * node + 1)
        rows = [*(2 * (parent + 1) for parent in self.parents(nodes)), *(2 * node + 1 for node in nodes)]
        return self._branches.feed(rows, above)


@register(
    "chimera",
    family="heads",
    exactness="lossless",
    paper="2402.15758",
    title="Chimera: trigrams and a layer estimate states to come",
    parameters=ChimeraParameters,
    needs_training=True,
    command="hasten train chimera --model MODEL",
    defaults=own_head("chimera"),
)
class Chimera(ContextDrafter):
    """A tree per request, grown level by level, all requests together.

    What drafts begin with is, of each request, the last state that the target computed and the estimate behind it.

    Raises:
        UserError: no weights, or some for another target; a static tree of heads whose accuracy nobody measured.
    """

    taps: ClassVar[tuple[tuple[Site, int], ...]] = (FINAL,)  # type: ignore[misc]
    rows: ClassVar[int] = 2

    def __init__(self, target: Target, parameters: ChimeraParameters) -> None:
        model, self.parameters = require_decoder(target, "chimera"), parameters
        if not parameters.head:
            raise UserError("chimera needs heads for this model: `hasten train chimera --model MODEL` makes them")
        config, keeps = model.config, model.config.layers[0].keeps
        if not isinstance(keeps, Slots):
            raise UserError("chimera has a layer of attention as the target's, and this model's first is another kind")
        weights = ChimeraWeights.load(Path(parameters.head), config.hidden_size, config.vocab_size, keeps.key_width)
        if parameters.tree == "static" and not weights.accuracy:
            raise UserError(f"chimera: {parameters.head} does not say how often its heads are right: tree=dynamic")
        self.model, self.rates = ChimeraModel(model, weights), weights.accuracy
        sizing = Sizing(target) if parameters.sized else None
        guesses = Guesses(self.model.words, noise=parameters.tree != "static")
        super().__init__(model, self.model.encoder, self.model.own_bytes, guesses, sizing)
        # A state and an estimate.
        self._last_bytes *= 2

    def read(self, states: Tensor, pieces: Sequence[tuple[Request, range]], spans: list[Span]) -> Tensor:
        trigrams: list[list[int]] = []
        positions: list[int] = []
        for request, places in pieces:
            # From the token of the position before on.
            first = max(0, places.start - 1)
            tokens = behind(request, range(first - 1, places.stop))
            for place in places:
                trigrams.append(trigram(tokens[max(0, place - 1 - first) : place + 2 - first]))
                positions += (place, place + 1)
        grams = self.model.grams(trigrams)
        states = states.to(grams.dtype)
        # h and g in turns: so a causal pass shows each g what it may see.
        outputs = self.advance(torch.stack([states, grams], 1).flatten(0, 1), None, positions, spans)
        return torch.cat([states.repeat_interleave(2, 0), outputs.to(grams.dtype)], -1)

    def draft(self, requests: Sequence[Request], states: Tensor, budgets: Sequence[int]) -> list[Draft]:
        known, estimates = states.chunk(2, -1)
        trees = [
            Growing(request, min(self.parameters.nodes, budget))
            for request, budget in zip(requests, budgets, strict=True)
        ]
        grown = [(place, [ROOT]) for place in range(len(trees))]
        for level in range(self.model.levels):
            of = [place for place, nodes in grown for _ in nodes]
            places = [Place(trees[place].request, node, level) for place, nodes in grown for node in nodes]
            found = self.guesses.behind(places, self.model.logits(level, known[of], estimates), self.parameters.ranks)
            rows = iter(zip(estimates, found, strict=True))
            for place, nodes in grown:
                for node in nodes:
                    trees[place].estimates[node], children = next(rows)
                    static = self.parameters.tree == "static"
                    trees[place].tree.add(node, at_rates(children, self.rates[level]) if static else children)
            if level + 1 == self.model.levels:
                break
            grown = [
                (place, nodes)
                for place, tree in enumerate(trees)
                if (nodes := tree.tree.frontier(self.parameters.width, self.parameters.least))
            ]
            if not grown:
                break
            estimates = self._expand(level + 1, [(trees[place], nodes) for place, nodes in grown])
        for tree in trees:
            self.guesses.made(tree.request, tree.tree.all)
        return [tree.tree.best() for tree in trees]

    def _expand(self, level: int, grown: Sequence[tuple[Growing, list[int]]]) -> Tensor:
        """Estimates [nodes, hidden] at these nodes, all of one level."""
        grams = self.model.grams([tree.trigram(node) for tree, nodes in grown for node in nodes])
        rows: list[Tensor] = []
        positions: list[int] = []
        spans: list[Span] = []
        answers: list[int] = []
        for tree, nodes in grown:
            parents, start, root = tree.parents(nodes), len(rows), len(tree.request.tokens) - 1
            rows += [tree.estimates[parent] for parent in parents]
            positions += [root + level - 1] * len(parents) + [root + level] * len(nodes)
            first = len(answers)
            answers += range(len(rows), len(rows) + len(nodes))
            rows += grams[first : len(answers)]
            spans.append(self.span(tree.request, start, len(rows), tree.mask(nodes)))
        return self.advance(torch.stack(rows), None, positions, spans)[answers].to(grams.dtype)

    def scratch_bytes(self, requests: Sequence[Request], nodes: int) -> int:
        if not requests or nodes < 1:
            return 0
        rows, levels = len(requests) * self.parameters.width, self.model.levels
        slots = self.rows * (max(len(request.tokens) for request in requests) + self.parameters.width * levels)
        # Estimates are kept until the trees are whole.
        level = self.guesses.scratch_bytes(rows, self.network.head.out_features) + levels * rows * self._last_bytes
        growing = level + self.pass_bytes(2 * rows, 2 * self.parameters.width * levels, slots)
        return max(super().scratch_bytes(requests, nodes), growing)
