"""Hydra: Medusa's heads, which see what was drafted before them.

"Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding", 2024, arXiv 2402.05109. Head k reads the final state at
position p and the embeddings of the tokens that stand, or are drafted, at p + 1 .. p + 1 + k, side by side:
`z = [h; E1; ..; Ek+1]`, `x = R z + SiLU(A z)`, and says token p + 2 + k. `hasten train hydra` makes the heads. Hydra++
has the heads read what a layer of their own makes of the states of the whole text (`prefix.py`), and more blocks.
Exactness: lossless, greedy and sampling (deterministic children, one draw of the target's per node).

`R z` and `A z` are sums of one product per part of z. Those of the state are made once; when a token is drafted and
worth growing, those of its embedding are made for all heads that will see it, and added to the sums of its path. So a
level costs one product [2 hidden, hidden] per new token and head to come, however long the paths are, and each level is
one call for all rows of all requests. The embedding is the target's own.

Decisions where the paper leaves room, or where its code does something else:

- *Tree.* A node's probability is the product of its path's, each told by a head that knows the path. By default the
  tree has the most probable nodes, and only what is among these grows (`Expansion`); `tree=static` takes the rates that
  were measured in place of the heads' own probabilities, which gives the paper's: one tree for all steps.
- *Root.* The authors draft below the likeliest token, always; here below the one that was drawn.
- *Vocabulary.* As with Medusa, heads may say only frequent tokens, and may share one output matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.engine import ROOT, Draft, Request, Target, register
from hasten.errors import UserError
from hasten.methods.heads.context import ContextDrafter
from hasten.methods.heads.guesses import Guesses, Place
from hasten.methods.heads.head import FINAL, StateDrafter, linear_of, logits_of, own_head, require_decoder
from hasten.methods.heads.hydra_weights import HydraWeights
from hasten.methods.heads.parameters import GrowingParameters
from hasten.methods.heads.pieces import columns, stacked
from hasten.methods.heads.prefix import prefix_network
from hasten.methods.heads.sizing import Sizing
from hasten.methods.heads.tree import Expansion, at_rates
from hasten.model import Decoder
from hasten.model.linear import Linear
from hasten.model.taps import Site

SUM_BYTES = 12
"""Of a path's sums: its parent's, what is added, and its own, in float32."""


@dataclass(frozen=True)
class HydraParameters(GrowingParameters):
    """Those of all trees that grow, with their defaults."""

    slug: ClassVar[str] = "hydra"


class HydraHeads:
    """Trained heads in the target's own storage.

    Attributes:
        own_bytes: of their weights.
        count: of heads.
    """

    def __init__(self, target: Decoder, weights: HydraWeights) -> None:
        linear, hidden = partial(linear_of, target), target.config.hidden_size
        pieces = [piece for head in weights.heads for piece in (head.mix, head.carry)]

        def part(number: int) -> Linear:
            """The products of one part of z, for all heads that have it."""
            cut = [columns(piece, number * hidden, (number + 1) * hidden) for piece in pieces[2 * max(0, number - 1) :]]
            biases = [piece.bias for piece in pieces if piece.bias is not None]
            return linear(stacked(cut, None if number else torch.cat(biases)))

        self.count, self.layers = len(weights.heads), weights.layers
        self.of_state, self.of_token = part(0), [part(number + 1) for number in range(self.count)]
        self.blocks = [None if head.block is None else linear(head.block) for head in weights.heads]
        self.outputs = [linear(output) for output in weights.outputs]
        self.words = None if weights.words is None else weights.words.to(target.device)
        self.embedding = target.embedding
        linears = [self.of_state, *self.of_token, *(block for block in self.blocks if block), *self.outputs]
        self.own_bytes = sum(each.nbytes() for each in linears)

    def begin(self, states: Tensor) -> Tensor:
        """Sums float32 [rows, heads, 2, hidden] of paths without a token, from states [rows, hidden]."""
        return self._parts(self.of_state.forward(states), self.count)

    def extend(self, level: int, sums: Tensor, tokens: Sequence[int]) -> Tensor:
        """Sums of paths that are one token longer.

        Args:
            level: tokens of each path before.
            sums: [rows, heads from `level` on, 2, hidden] of these.
            tokens: per row.
        """
        # What was given as an embedding has no token: some word stands there.
        ids = torch.tensor(tokens, device=self.embedding.device).clamp(min=0)
        return sums + self._parts(self.of_token[level].forward(F.embedding(ids, self.embedding)), self.count - level)

    def _parts(self, products: Tensor, heads: int) -> Tensor:
        return torch.unflatten(products.float(), 1, (heads, 2, -1))

    def logits(self, head: int, sums: Tensor) -> Tensor:
        """[rows, words] of one head, from its own sums [rows, 2, hidden]."""
        x = (sums[:, 1] + F.silu(sums[:, 0])).to(self.embedding.dtype)
        block = self.blocks[head]
        for _ in range(self.layers - 1):
            assert block is not None
            x = x + F.silu(block.forward(x))
        return logits_of(self.outputs[min(head, len(self.outputs) - 1)], x)


class HydraTrees:
    """Drafts of heads, for whoever has the states that they begin with.

    Raises:
        UserError: a static tree of heads whose accuracy nobody measured.
    """

    def __init__(self, target: Decoder, weights: HydraWeights, parameters: HydraParameters) -> None:
        self.heads, self.rates, self.parameters = HydraHeads(target, weights), weights.accuracy, parameters
        self.guesses = Guesses(self.heads.words, noise=parameters.tree != "static")
        if parameters.tree == "static" and not weights.accuracy:
            raise UserError(f"hydra: {parameters.head} does not say how often its heads are right: tree=dynamic")

    def scratch_bytes(self, requests: Sequence[Request]) -> int:
        """See `Drafter.scratch_bytes`: the sums and logits of the widest level."""
        rows = len(requests) * self.parameters.width
        sums = rows * self.heads.count * 2 * self.heads.embedding.shape[1] * SUM_BYTES
        return sums + self.guesses.scratch_bytes(rows, self.heads.outputs[0].out_features)

    def grown(self, requests: Sequence[Request], states: Tensor, budgets: Sequence[int]) -> list[Draft]:
        """See `HeadDrafter.draft`: level by level, all requests together."""
        trees = [Expansion(min(self.parameters.nodes, budget)) for budget in budgets]
        of = dict(zip(trees, requests, strict=True))
        rows, tokens = [(tree, ROOT) for tree in trees], [request.tokens[-1] for request in requests]
        sums, width, least = self.heads.begin(states), self.parameters.width, self.parameters.least
        for level in range(self.heads.count):
            sums = self.heads.extend(level, sums, tokens)
            places = [Place(of[tree], node, level) for tree, node in rows]
            children = self.guesses.behind(places, self.heads.logits(level, sums[:, 0]), self.parameters.ranks)
            for (tree, node), found in zip(rows, children, strict=True):
                tree.add(node, at_rates(found, self.rates[level]) if self.parameters.tree == "static" else found)
            place = {parent: row for row, parent in enumerate(rows)}
            rows = [(tree, node) for tree in trees for node in tree.frontier(width, least)]
            if not rows:
                break
            tokens = [tree.all.tokens[node] for tree, node in rows]
            sums = sums[[place[tree, tree.all.parents[node]] for tree, node in rows], 1:]
        for tree, request in of.items():
            self.guesses.made(request, tree.all)
        return [tree.best() for tree in trees]


class Hydra(StateDrafter):
    """A tree per request, from heads on the target's states."""

    def __init__(self, target: Decoder, trees: HydraTrees, sizing: Sizing | None) -> None:
        super().__init__(target, trees.guesses, sizing)
        self.trees = trees

    @property
    def memory_bytes(self) -> int:
        return super().memory_bytes + self.trees.heads.own_bytes

    def scratch_bytes(self, requests: Sequence[Request], nodes: int) -> int:
        return self.trees.scratch_bytes(requests)

    def draft(self, requests: Sequence[Request], states: Tensor, budgets: Sequence[int]) -> list[Draft]:
        return self.trees.grown(requests, states, budgets)


class PrefixHydra(ContextDrafter):
    """A tree per request, from heads on what a layer of their own makes of the target's states (Hydra++)."""

    taps = (FINAL,)
    output: ClassVar[tuple[Site, int]] = FINAL

    def __init__(self, target: Decoder, network: Decoder, trees: HydraTrees, sizing: Sizing | None) -> None:
        layer_bytes = sum(layer.nbytes() for layer in network.layers)
        super().__init__(target, network, layer_bytes + trees.heads.own_bytes, trees.guesses, sizing)
        self.trees = trees

    def enter(self, states: Tensor, tokens: Tensor) -> Tensor:
        return states

    def scratch_bytes(self, requests: Sequence[Request], nodes: int) -> int:
        return super().scratch_bytes(requests, nodes) + self.trees.scratch_bytes(requests)

    def draft(self, requests: Sequence[Request], states: Tensor, budgets: Sequence[int]) -> list[Draft]:
        return self.trees.grown(requests, states, budgets)


@register(
    "hydra",
    family="heads",
    exactness="lossless",
    paper="2402.05109",
    title="Hydra: heads that see what was drafted before them",
    parameters=HydraParameters,
    needs_training=True,
    command="hasten train hydra --model MODEL",
    defaults=own_head("hydra"),
)
def hydra(target: Target, parameters: HydraParameters) -> Hydra | PrefixHydra:
    """The heads of a folder, with a prefix layer where it has one.

    Raises:
        UserError: no heads, or some for another target; a static tree of heads whose accuracy nobody measured.
    """
    model = require_decoder(target, "hydra")
    if not parameters.head:
        raise UserError("hydra needs heads for this model: `hasten train hydra --model MODEL` makes them")
    folder = Path(parameters.head)
    weights = HydraWeights.load(folder, model.config.hidden_size, model.config.vocab_size)
    trees, sizing = HydraTrees(model, weights, parameters), Sizing(target) if parameters.sized else None
    if weights.prefix:
        return PrefixHydra(model, prefix_network(model, weights.prefix, folder), trees, sizing)
    return Hydra(model, trees, sizing)
