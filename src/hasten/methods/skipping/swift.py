"""SWIFT: the target without some of its sublayers drafts for itself; which ones is searched while it decodes.

"SWIFT: On-the-Fly Self-Speculative Decoding for LLM Inference Acceleration", 2024, arXiv 2410.06916. Layers of a deep
model change the residual stream so little that many can be bypassed and most next tokens stay the same; which ones can
depends on the text. A skip set names attention and MLP sublayers; the first and the last layer are always kept.
Drafting: one token after the other until the skipped model is unsure, with siblings where it is less sure; then one
verification of the tree. Search: random sets, now and then one that a Gaussian process suggests, judged by
*matchness*: how many of the text's latest tokens the skipped model predicts, in one parallel pass.

Exactness: lossless, whatever the skip set. Greedily and with the default acceptance the tree is deterministic (top-k,
with the target's own keyed noise when sampling); with `acceptance="max"` its children are drawn without replacement,
and the draft says so (rule D). No training, no second model, and no copy of the cache: drafted rows see the committed
ones, which are the full model's, stand behind them, and are dropped before verification.

Different from the authors' program:
- A challenger and the set in use are judged on the same window, and the window slides: a set that once met an easy
  text does not stay for that, and trials do not fit one text's beginning.
- The search starts again when acceptance falls (the paper shows that a stream may change its subject).
- Trees are narrower: the widths 3, 5, 8, 10 (greedy) and 1, 3, 5, 10 (sampling) are shares of `width`, since a row to
  be verified is not free on a CPU. Nor is a trial, so that not every step has one (`interval=1` is theirs).
- The search state belongs to a tenant, not to the process. All requests of a tenant share it; so where the text depends
  on the draft (`acceptance` `max` and `typical`), it depends on what else was decoded, though its law (`max`) does not.

Scores count predicted tokens, so the sampled text of a high temperature lowers them for all sets alike. Sublayers
count as equally dear, as in the paper. Expect gains from deep models only: five layers leave three to choose from.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from math import comb

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.cache import Cache
from hasten.engine import ROOT, Draft, Drafter, Observation, Request, Target, register
from hasten.engine.memory import logits_bytes
from hasten.engine.sampling import sampler
from hasten.errors import UserError, require
from hasten.methods.drafters.drawing import Beliefs, Child, Matching, likeliest, processed, sampled, sampled_bytes
from hasten.methods.drafters.shared_noise import Belief
from hasten.model import Decoder, Rows, Slots, Span

COINS = 9
"""The purpose of the drafter's coins: another stream than the verifier's."""
ROW = 32
"""Bytes per logit of what is made of a row of them, beside what choosing a token takes."""
TENANTS = 64
"""Search states kept; the one that was not used for longest goes first."""
SURE = (0.95, 0.8, 0.5)
GREEDY_TENTHS, SAMPLED_TENTHS = (3, 5, 8, 10), (1, 3, 5, 10)
"""Tenths of `width` that a level gets above 0.95, 0.8, 0.5 confidence and below."""

SkipSet = NDArray[np.float64]
"""A skip set: ones and zeros [2 * (layers - 2)], attention of the layers 1 .. layers-2, then their MLPs."""


@dataclass(frozen=True)
class SwiftParameters:
    """Parameters of drafting and search.

    Attributes:
        ratio: share of the sublayers between first and last layer that are skipped.
        length: levels of a draft, at most.
        threshold: drafting stops behind a token of less confidence.
        width: nodes of an unsure level; surer ones have fewer, and 1 makes a chain.
        window: latest tokens that a trial is judged on.
        interval: steps per trial.
        bayes_interval: trials per suggestion of the Gaussian process.
        max_score: the search ends with a set of more matchness.
        max_tolerance: it ends after more trials than these, or than there are sets, without a better one.
        max_trials: it ends after so many trials; 0 keeps every second layer's sublayers for good.
        drop: it starts again when recent acceptance falls this far below the usual.

    Raises:
        UserError: out of range.
    """

    ratio: float = 0.45
    length: int = 25
    threshold: float = 0.8
    width: int = 3
    window: int = 32
    interval: int = 4
    bayes_interval: int = 25
    max_score: float = 0.95
    max_tolerance: int = 300
    max_trials: int = 1000
    drop: float = 0.2

    def __post_init__(self) -> None:
        checks = (
            (0 < self.ratio < 1, "ratio must be between 0 and 1"),
            (1 <= self.length <= 64, "length must be between 1 and 64"),
            (0 <= self.threshold <= 1, "threshold must be between 0 and 1"),
            (1 <= self.width <= 10, "width must be between 1 and 10"),
            (4 <= self.window <= 512, "window must be between 4 and 512"),
            (self.interval >= 1, "interval must be at least 1"),
            (self.bayes_interval >= 1, "bayes_interval must be at least 1"),
            (0 < self.max_score <= 1, "max_score must be above 0 and at most 1"),
            (self.max_tolerance >= 0, "max_tolerance must not be negative"),
            (self.max_trials >= 0, "max_trials must not be negative"),
            (0 < self.drop <= 1, "drop must be above 0 and at most 1"),
        )
        require(checks, "swift")


@dataclass(frozen=True)
class Skipped:
    """Layers whose attention, and layers whose MLP, a pass leaves out."""

    attention: frozenset[int]
    mlp: frozenset[int]


@torch.inference_mode()
def forward(model: Decoder, rows: Rows, skipped: Skipped) -> Tensor:
    """The default forward without some sublayers: each leaves the residual stream as it is.

    A skipped attention stores nothing, and the slots of its rows must not be read: as long as these rows are pending,
    all passes that see them skip the same set.

    Returns:
        Float32 logits [rows, vocabulary].
    """
    step = model.start(rows)
    x = model.embed(rows)
    for layer in model.layers:
        if layer.index not in skipped.attention:
            x = layer.mix(x, step)
        if layer.index not in skipped.mlp:
            x = layer.feed(x, step)
    return model.logits(x, None)


class Surrogate:
    """A Gaussian process from skip sets to scores: squared-exponential kernel on ones and zeros, noisy observations.

    Args:
        size: of the sets.
    """

    NOISE, KAPPA, REMEMBERED = 1e-2, 2.5, 256

    def __init__(self, size: int) -> None:
        self.sets, self.scores = np.zeros((0, size)), np.zeros(0)

    def add(self, tried: SkipSet, score: float) -> None:
        """Learn one score; old ones are forgotten in time, as the text they were measured on is."""
        self.sets = np.vstack([self.sets, tried])[-self.REMEMBERED :]
        self.scores = np.append(self.scores, score)[-self.REMEMBERED :]

    def bound(self, sets: NDArray[np.float64]) -> NDArray[np.float64]:
        """Upper confidence bounds [candidates] of sets [candidates, size], in standard deviations of the scores."""
        normal = (self.scores - self.scores.mean()) / (self.scores.std() or 1.0)
        known = self._kernel(self.sets, self.sets) + self.NOISE * np.eye(len(self.sets))
        cross = self._kernel(sets, self.sets)
        weights = np.linalg.solve(known, cross.T)
        variance = 1 - (cross.T * weights).sum(0)
        return np.asarray(normal @ weights + self.KAPPA * np.sqrt(variance.clip(min=0)))

    @staticmethod
    def _kernel(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
        """By the number of sublayers in which sets differ; a quarter of them is one length scale (squared)."""
        differing = one.sum(1)[:, None] + other.sum(1) - 2 * one @ other.T
        return np.asarray(np.exp(-2 * differing / one.shape[1]))


class Search:
    """The skip set in use, and the hunt for a better one.

    Args:
        layers: of the model.
        parameters: of the method.
    """

    CANDIDATES, RECENT = 512, 32

    def __init__(self, layers: int, parameters: SwiftParameters) -> None:
        self.parameters = parameters
        self.inner = layers - 2
        self.count = max(1, int(2 * self.inner * parameters.ratio))
        self.patience = min(parameters.max_tolerance, comb(2 * self.inner, self.count))
        self._random = np.random.default_rng(0)
        self.chosen = self._every_second_layer()
        self.steps = 0
        self.restart()

    def restart(self) -> None:
        """Search anew, from the set in use."""
        self.best: float | None = None
        self.judged_at = (-1, 0)
        self.trials = self.tolerance = 0
        self.surrogate = Surrogate(2 * self.inner)
        self.active = self.parameters.max_trials > 0
        self._rates, self._usual, self._recent = 0, 0.0, 0.0

    @property
    def skipped(self) -> Skipped:
        return self.layers_of(self.chosen)

    def layers_of(self, chosen: SkipSet) -> Skipped:
        """A set as layer numbers."""
        attention, mlp = (np.flatnonzero(half) + 1 for half in np.split(chosen, 2))
        return Skipped(frozenset(attention.tolist()), frozenset(mlp.tolist()))

    @property
    def due(self) -> bool:
        """Whether this step, which is counted here, should try a set."""
        self.steps += 1
        return self.active and self.steps % self.parameters.interval == 0

    def suggest(self) -> SkipSet:
        """The next set to try: a random one, or of many random ones and the chosen one's neighbours the best bet."""
        self.trials += 1
        if self.trials % self.parameters.bayes_interval or len(self.surrogate.scores) < 2:
            return np.asarray(self._random_sets(1)[0])
        candidates = np.vstack([self._random_sets(self.CANDIDATES), self._neighbours()])
        return np.asarray(candidates[self.surrogate.bound(candidates).argmax()])

    def decide(self, tried: SkipSet, score: float, best: float) -> None:
        """Keep the better set; end the search where the rules say so.

        `best` is the chosen set's score: of the same window as `score`, unless that is lower anyway.
        """
        self.best = best
        self.tolerance += 1
        if score > best:
            self.chosen, self.best, self.tolerance = tried, score, 0
        ended = (
            self.best > self.parameters.max_score
            or self.tolerance > self.patience
            or self.trials >= self.parameters.max_trials
        )
        self.active = not ended

    def accepted(self, rate: float) -> None:
        """A verification accepted this share of the drafted tokens that it came to; without a search, watch it."""
        if self.active or not self.parameters.max_trials:
            return
        self._rates += 1
        self._usual += (rate - self._usual) / self._rates
        self._recent += (rate - self._recent) / min(self._rates, self.RECENT)
        if self._rates > 2 * self.RECENT and self._recent < self._usual - self.parameters.drop:
            self.restart()

    @property
    def nbytes(self) -> int:
        return self.chosen.nbytes + self.surrogate.sets.nbytes + self.surrogate.scores.nbytes

    def _every_second_layer(self) -> SkipSet:
        """The layers 1, 3, 5 .., then the others, both sublayers, from the end on: early layers matter most."""
        layers = [*range(1, self.inner + 1, 2)][::-1] + [*range(2, self.inner + 1, 2)][::-1]
        order = [index for layer in layers for index in (layer - 1, self.inner + layer - 1)]
        chosen = np.zeros(2 * self.inner)
        chosen[order[: self.count]] = 1
        return chosen

    def _random_sets(self, number: int) -> NDArray[np.float64]:
        """[number, size], uniform among sets of the right count."""
        ranks = self._random.random((number, 2 * self.inner)).argsort(1)
        return (ranks < self.count).astype(np.float64)

    def _neighbours(self) -> NDArray[np.float64]:
        """All sets with one other sublayer in place of one of the chosen."""
        inside, outside = np.flatnonzero(self.chosen), np.flatnonzero(self.chosen == 0)
        sets = np.tile(self.chosen, (len(inside) * len(outside), 1))
        rows = np.arange(len(sets))
        sets[rows, np.repeat(inside, len(outside))] = 0
        sets[rows, np.tile(outside, len(inside))] = 1
        return sets


@register(
    "swift",
    family="skipping",
    exactness="lossless",
    paper="2410.06916",
    title="SWIFT: the target drafts, with sublayers skipped",
    parameters=SwiftParameters,
)
class Swift(Drafter):
    """Drafts for all requests of a tenant together, one pass of the skipped model per level.

    Raises:
        UserError: the model has no layers to skip, or layers that cannot forget drafted rows.
    """

    def __init__(self, target: Target, parameters: SwiftParameters) -> None:
        if not isinstance(target.model, Decoder):
            raise UserError("swift: needs a transformer, since it skips parts of its layers")
        layers = target.model.config.layers
        if len(layers) < 3:
            raise UserError(
                f"swift: the first and the last layer are always kept, so a model of {len(layers)} has none to skip; "
                "it needs at least 3"
            )
        if not all(isinstance(layer.keeps, Slots) for layer in layers):
            raise UserError("swift: needs a model of attention layers only, since recurrent ones cannot forget a draft")
        self.model, self.parameters, self.end_ids = target.model, parameters, target.end_ids
        self._searches: OrderedDict[str, Search] = OrderedDict()
        self._proposed: dict[int, tuple[int, list[int]]] = {}
        self.beliefs = Beliefs()

    @property
    def memory_bytes(self) -> int:
        return sum(search.nbytes for search in self._searches.values())

    def growth_bytes(self, requests: Sequence[Request], rows: int = 0) -> int:
        # A search adds a set and its score per trial; a new tenant begins one.
        trials = len(requests) * 16 * (2 * len(self.model.layers) + 1)
        new = {request.params.tenant for request in requests} - self._searches.keys()
        if not new:
            return trials
        return trials + len(new) * Search(len(self.model.layers), self.parameters).nbytes

    def scratch_bytes(self, requests: Sequence[Request], nodes: int) -> int:
        """Two levels' logits, what is made of one row of them, and what was drawn from; or a trial and its slots."""
        window, vocabulary = self.parameters.window, self.model.config.vocab_size
        slots = max(len(request.tokens) for request in requests) + nodes
        making = max(each.sampler.processing_bytes(1) for each in requests) + vocabulary * ROW
        drawn = sum(sampled_bytes(each.sampler, nodes, vocabulary) for each in requests)
        levels = logits_bytes(2 * len(requests), vocabulary) + self.model.scratch_bytes(len(requests), 0, slots)
        searches = [self._searches.get(each.params.tenant) for each in requests]
        if not self.parameters.max_trials or not any(search is None or search.active for search in searches):
            return levels + making + drawn
        block = Cache(self.model.config.layers, self.model.cache_dtype, self.model.device).sequence_bytes(window)
        trial = block + logits_bytes(window, vocabulary) + self.model.scratch_bytes(window, 0, slots)
        return max(levels + making + drawn, trial)

    def search(self, tenant: str) -> Search:
        """The tenant's search, begun on demand."""
        if tenant not in self._searches:
            self._searches[tenant] = Search(len(self.model.layers), self.parameters)
        self._searches.move_to_end(tenant)
        if len(self._searches) > TENANTS:
            self._searches.popitem(last=False)
        return self._searches[tenant]

    def propose(self, request: Request, budget: int) -> Draft:
        return self.propose_all([request], [budget])[0]

    def propose_all(self, requests: Sequence[Request], budgets: Sequence[int]) -> list[Draft]:
        """One trial per tenant where the search is on, then the drafts, level by level."""
        chains = [
            _Chain(request, self.parameters, budget, self.beliefs.of(request), self.end_ids)
            for request, budget in zip(requests, budgets, strict=True)
        ]
        tenants: dict[str, list[_Chain]] = {}
        for chain in chains:
            tenants.setdefault(chain.request.params.tenant, []).append(chain)
        for tenant, group in tenants.items():
            search = self.search(tenant)
            if search.due:
                self._try(search, [chain.request for chain in group])
            self._grow(group, search.skipped)
        for chain in chains:
            self._proposed[chain.request.id] = (len(chain.request.tokens), chain.tokens)
            self.beliefs.drafted(chain.request, chain.matching, chain.draft)
        return [chain.finish(budget) for chain, budget in zip(chains, budgets, strict=True)]

    def observe(self, request: Request, seen: Observation) -> None:
        self.beliefs.observe(request, seen)
        start, chain = self._proposed.pop(request.id, (-1, []))
        if not chain or start != len(request.tokens) - len(seen.tokens):
            return  # Another drafter's turn.
        met = list(map(int.__eq__, chain, seen.tokens))
        right = (*met, False).index(False)
        self.search(request.params.tenant).accepted(right / min(len(met), right + 1))

    def end(self, request: Request) -> None:
        self.beliefs.end(request)
        self._proposed.pop(request.id, None)

    # Drafting

    def _grow(self, chains: Sequence[_Chain], skipped: Skipped) -> None:
        """Feed each chain's latest token until all chains are complete; nothing of it stays in the cache."""
        active = [chain for chain in chains if chain.open]
        level = 0
        while active:
            tokens = torch.tensor([chain.latest for chain in active], device=self.model.device)
            positions = torch.tensor([chain.request.read + level for chain in active], device=self.model.device)
            spans = [Span(chain.request.sequence, row, row + 1, extend=level > 0) for row, chain in enumerate(active)]
            logits = forward(self.model, Rows(tokens, positions, spans), skipped)
            sampler.likeliest_of_model(logits)
            for row, chain in enumerate(active):
                chain.grow(logits[row : row + 1])
            active = [chain for chain in active if chain.open]
            level += 1
        for chain in chains:
            chain.request.sequence.commit(0)

    # Search

    def _try(self, search: Search, requests: Sequence[Request]) -> None:
        """Judge one more set on the latest tokens of one of the requests, in turn."""
        window = self.parameters.window
        ready = [request for request in requests if len(request.tokens) - request.prompt_length >= window]
        if not ready:
            return
        request = ready[search.trials % len(ready)]
        tried = search.suggest()
        try:
            score = self.matchness(request, search.layers_of(tried))
            best = search.best
            # The set in use is judged again where it is challenged, and where its score is of another text.
            text, length = search.judged_at
            if best is None or score > best or text != request.id or len(request.tokens) - length >= window:
                best = self.matchness(request, search.skipped)
                search.judged_at = (request.id, len(request.tokens))
        except UserError:
            return  # The cache has no room for a trial, which is no reason to fail a request.
        search.surrogate.add(tried, score)
        search.decide(tried, score, best)

    def matchness(self, request: Request, skipped: Skipped) -> float:
        """Share of the last `window` tokens that the skipped model predicts, over the full model's cache before them.

        The cache is read in place; only the window's own rows are written, to a block that goes when they are judged.

        Raises:
            UserError: the cache has no room for the window.
        """
        window = self.parameters.window
        start = len(request.tokens) - 1 - window
        scratch = request.sequence.fork()
        try:
            scratch.crop(start)
            rows = Rows.of(scratch, request.tokens[start:-1], start, self.model.device)
            predicted = sampler.likeliest(forward(self.model, rows, skipped))
        finally:
            scratch.release()
        return sum(map(int.__eq__, predicted, request.tokens[start + 1 :])) / window


class _Chain:
    """The draft of one request: a chain of the skipped model's tokens, and siblings beside them."""

    def __init__(
        self,
        request: Request,
        parameters: SwiftParameters,
        budget: int,
        belief: Belief,
        end_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.request, self.parameters = request, parameters
        self.matching = Matching(request, belief)
        self.depth = min(parameters.length, budget, request.stopper.left - 1)
        self.tokens: list[int] = []
        self.draft = Draft()
        self.open = self.depth > 0
        self._closed = request.params.endings(end_ids)
        self._tip, self._certainty = ROOT, 1.0
        self._coins = request.sampler.coins(len(request.tokens), COINS)

    @property
    def latest(self) -> int:
        """The token to be fed next."""
        return self.tokens[-1] if self.tokens else self.request.tokens[-1]

    def grow(self, logits: Tensor) -> None:
        """Add a level below the chain's tip, from its logits [1, vocabulary]."""
        children, first, draft = self._children(logits), len(self.draft), self.draft
        if not children:
            # Nothing is allowed here.
            self.open = False
            return
        (token, certainty), estimate = children[0], 1.0
        self.tokens.append(token)
        sure = certainty >= self.parameters.threshold
        self.open = len(self.tokens) < self.depth and sure and token not in self._closed
        for token, confidence in children[: self._width(certainty)]:
            # Drawn siblings are verified in the order in which they were drawn, so none is worth more than one before.
            estimate = min(estimate, confidence) if self._tip in draft.drawn else confidence
            draft.tokens.append(token)
            draft.parents.append(self._tip)
            draft.estimates.append(self._certainty * estimate)
        self._tip, self._certainty = first, draft.estimates[first]

    def finish(self, budget: int) -> Draft:
        """The draft, its most valuable `budget` nodes first and only: no node is worth more than the one above it.

        A sampled draft ends where the budget does: a choice by the values that were drawn would bias the result.
        """
        order = list(range(len(self.draft)))
        if not self.draft.drawn:
            order.sort(key=lambda node: -self.draft.estimates[node])
        return self.draft.subset(order[:budget])

    def _width(self, confidence: float) -> int:
        """Nodes of a level whose first token has this confidence."""
        tenths = GREEDY_TENTHS if self.request.params.greedy else SAMPLED_TENTHS
        rank = sum(confidence <= bound for bound in SURE)
        return -(-self.parameters.width * tenths[rank] // 10)

    def _children(self, logits: Tensor) -> list[Child]:
        """Up to `width` tokens in draw order, and how sure each is.

        That is the probability before temperature and filters; with shared noise, what the request's belief says.
        """
        sampler, params, paths = self.request.sampler, self.request.params, [self.tokens]
        distribution, width = processed(sampler, logits, paths), self.parameters.width
        if params.greedy:
            return likeliest(distribution, width)[0]
        if params.acceptance == "match":
            return list(self.matching.children(distribution, [self._tip], paths, width)[0])
        q = distribution.dense(0).nan_to_num(0.0)
        children = sampled(self.draft, self._tip, q, None, self._coins)
        # No coin is thrown for a child that cannot be.
        tokens = [token for token, _ in islice(children, min(width, int(q.count_nonzero())))]
        probabilities = sampler.adjusted(logits, paths).softmax(-1)
        return list(zip(tokens, probabilities[0, tokens].tolist(), strict=True))
