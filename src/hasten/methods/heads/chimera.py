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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.engine import ROOT, Draft, Request, Target, register
from hasten.engine.memory import logits_bytes
from hasten.errors import UserError
from hasten.methods.drafters.sequences import Branches
from hasten.methods.heads.chimera_weights import TRIGRAM, ChimeraWeights
from hasten.methods.heads.context import ContextDrafter, behind
from hasten.methods.heads.guesses import Guesses, Place
from hasten.methods.heads.head import FINAL, backend_of, layer_of, linear_of, logits_of, own_head, require_decoder
from hasten.methods.heads.parameters import GrowingParameters
from hasten.methods.heads.sizing import Sizing
from hasten.methods.heads.tree import Expansion, at_rates
from hasten.model import Decoder, LayerConfig, Span
from hasten.model.assembly import assemble
from hasten.model.config import Slots
from hasten.model.linear import Linear
from hasten.model.taps import Site
from hasten.model.weights import Piece, Pieces


@dataclass(frozen=True)
class ChimeraParameters(GrowingParameters):
    """Parameters."""

    slug: ClassVar[str] = "chimera"

    width: int = 4
    least: float = 0.2


class ChimeraModel:
    """Both encoders and the heads, in the target's storage.

    Attributes:
        levels: heads.
        words: int64, the tokens of a row of logits; None where it is the vocabulary.
        encoder: the layer, as a decoder whose rows enter as embeddings; its head is what says words.
        own_bytes: of the weights.
    """

    def __init__(self, target: Decoder, weights: ChimeraWeights) -> None:
        linear = partial(linear_of, target)
        self.embedding, self.levels = target.embedding, len(weights.heads)
        self.words = None if weights.words is None else weights.words.to(target.device)
        self.narrow = None if weights.narrow is None else linear(weights.narrow)
        self.mix, self.out = linear(weights.mix), linear(weights.out)
        self.heads = [linear(head) for head in weights.heads]
        self.complete = self.heads[0].in_features == 2 * target.config.hidden_size
        said = target.head if weights.said is None else linear(weights.said)
        self.encoder = _encoder(target, weights, said)
        own = [self.mix, self.out, *self.heads, *([self.narrow] if self.narrow else [])]
        own += [] if said is target.head else [said]
        self.own_bytes = sum(each.nbytes() for each in own) + self.encoder.layers[0].nbytes()

    def grams(self, trigrams: Sequence[Sequence[int]]) -> Tensor:
        """g [rows, hidden] of rows of three tokens."""
        # What was given as an embedding has no token: some word stands there.
        ids = torch.tensor(trigrams, device=self.embedding.device).clamp(min=0)
        parts = F.embedding(ids.flatten(), self.embedding)
        if self.narrow is not None:
            parts = self.narrow.forward(parts)
        side = parts.reshape(len(ids), -1)
        return self.out.forward(side + F.silu(self.mix.forward(side))).to(self.embedding.dtype)

    def logits(self, level: int, states: Tensor, estimates: Tensor) -> Tensor:
        """[rows, words] of one head.

        Args:
            states: [rows, hidden], the last that the target computed.
            estimates: [rows, hidden], at the token that stands so many levels behind the root.
        """
        if self.complete:
            return logits_of(self.heads[level], torch.cat([states, estimates], -1))
        return logits_of(self.encoder.head, estimates + self.heads[level].forward(states))


def _encoder(target: Decoder, weights: ChimeraWeights, head: Linear) -> Decoder:
    """A decoder of the one layer."""
    width, layer = target.config.layers[0].slots.key_width, weights.layer
    shape = LayerConfig.attention(
        layer.queries.shape[0] // width, layer.keys.shape[0] // width, width, layer.gate.shape[0]
    )
    config = replace(target.config, layers=(shape,))
    # What heads read is the layer's output itself.
    outside = Pieces(config, None, {"embedding": Piece(target.embedding)}, {"head": head}, frozenset({"norm"}))
    own = layer_of(target, config, layer.pieces)
    return assemble(config, (outside, own), backend_of(target), target.cache_dtype)


def trigram(tokens: Sequence[int]) -> list[int]:
    """The last three of two or more tokens: the second of a text counts twice."""
    last = list(tokens[-TRIGRAM:])
    return last if len(last) == TRIGRAM else [*last, last[-1]]


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

    def place(self, node: int) -> Place:
        """Where a node's children stand."""
        return Place.behind(self.request, self.tree.all, node)

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
            places = [trees[place].place(node) for place, nodes in grown for node in nodes]
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
        # Logits, and what their sum of exponentials is made of; estimates are kept until the trees are whole.
        level = 3 * logits_bytes(rows, self.network.head.out_features) + levels * rows * self._last_bytes
        growing = level + self.pass_bytes(2 * rows, 2 * self.parameters.width * levels, slots)
        return max(super().scratch_bytes(requests, nodes), growing)
