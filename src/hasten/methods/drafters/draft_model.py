"""Speculative decoding with a smaller model of the same tokenizer, as a chain or a tree.

Leviathan et al. 2211.17192 and Chen et al. 2302.01318 (chain), SpecInfer 2305.09781 and Sequoia 2402.12374 (trees).
Exactness: lossless. With the default acceptance the drafter draws with the target's own keyed noise, so its
sampled proposals agree with the target's draw as often as the two distributions allow; with `acceptance="max"` it
draws from its own coins and hands over q (rule B for a chain, D for a tree).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hasten.cache import Cache
from hasten.cache import Sequence as CacheSequence
from hasten.engine import ROOT, Draft, Drafter, Drawn, Request, Target, register
from hasten.engine.sampling import draw
from hasten.errors import UserError
from hasten.model import Decoder, Model, Rows, Span, load_model
from hasten.model.checkpoint import resolve
from hasten.model.tokenizer import load_tokenizer, same_vocabulary

DRAFT_PURPOSE = 1
"""Coins of the drafter are another stream than the verifier's."""


@dataclass(frozen=True)
class DraftModelParameters:
    """Parameters of the drafter.

    Attributes:
        model: folder or hub id; `auto` looks for a sibling folder named like the target's with `-draft`.
        length: levels of the draft.
        width: children per expanded node, and nodes expanded per level; 1 is a chain.
        confidence: a chain stops behind a token that the drafter gives less probability than this.
        dtype: of the drafter's weights.

    Raises:
        UserError: out of range.
    """

    model: str = "auto"
    length: int = 5
    width: int = 1
    confidence: float = 0.4
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if not 1 <= self.length <= 32:
            raise UserError("draft-model: length must be between 1 and 32")
        if not 1 <= self.width <= 8:
            raise UserError("draft-model: width must be between 1 and 8")
        if not 0 <= self.confidence <= 1:
            raise UserError("draft-model: confidence must be between 0 and 1")


@register(
    "draft-model",
    family="drafters",
    exactness="lossless",
    paper="2211.17192",
    title="Speculative decoding with a smaller model, chain or tree",
    parameters=DraftModelParameters,
)
class DraftModel(Drafter):
    """Drafts for the whole batch together: one forward of the small model per level."""

    def __init__(self, target: Target, parameters: DraftModelParameters) -> None:
        self.parameters = parameters
        self.model = self._load(target, parameters)
        self.cache = Cache(self.model.config.layers, self.model.cache_dtype, self.model.device)
        self._sequences: dict[int, CacheSequence] = {}

    def _load(self, target: Target, parameters: DraftModelParameters) -> Model:
        """The small model, after checking that it speaks the target's tokens."""
        name = parameters.model
        if name == "auto":
            if target.folder is None:
                raise UserError("draft-model needs a model: use draft-model:model=FOLDER")
            name = f"{target.folder.rstrip('/')}-draft"
            if not Path(name).is_dir():
                raise UserError(
                    f"draft-model finds no drafter at {name}: name one (draft-model:model=FOLDER), or train one with "
                    f"'hasten train lm --output {name} --tokenizer {target.folder}'"
                )
        folder = resolve(name)
        if target.tokenizer is not None and not same_vocabulary(load_tokenizer(folder), target.tokenizer):
            raise UserError(f"the drafter {name!r} has another tokenizer than the target; they must be the same")
        model: Decoder = load_model(folder, dtype=parameters.dtype, device=str(target.model.device))
        if model.config.vocab_size < target.model.config.vocab_size:
            size = f"{model.config.vocab_size} < {target.model.config.vocab_size}"
            raise UserError(f"the drafter {name!r} has a smaller vocabulary than the target ({size})")
        return model

    def end(self, request: Request) -> None:
        sequence = self._sequences.pop(request.id, None)
        if sequence is not None:
            sequence.release()

    def propose(self, request: Request, budget: int) -> Draft:
        return self.propose_all([request], [budget])[0]

    def propose_all(self, requests: Sequence[Request], budgets: Sequence[int]) -> list[Draft]:
        """Level by level; a request leaves the batch when its draft is complete."""
        room = self.model.config.max_positions
        builders = [
            _Builder(request, self.parameters, budget, room) for request, budget in zip(requests, budgets, strict=True)
        ]
        active = [builder for builder in builders if builder.depth > 0]
        first = True
        while active:
            rows, wanted = self._rows(active, first)
            logits = self.model.forward(rows, wanted)
            offset = 0
            for builder, span in zip(active, rows.spans, strict=True):
                stop = offset + builder.wanted
                if first:
                    # Only committed tokens stay in the drafter's cache; nodes are pending, level behind level.
                    self._sequence(builder.request).commit(span.stop - span.start)
                builder.grow(logits[offset:stop, : builder.request.sampler.vocabulary])
                offset = stop
            active = [builder for builder in active if builder.frontier]
            first = False
        return [builder.draft for builder in builders]

    def _rows(self, active: Sequence[_Builder], first: bool) -> tuple[Rows, list[int]]:
        """Rows of one level: uncached tokens of each request at first, then the nodes to expand."""
        tokens: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        wanted: list[int] = []
        for builder in active:
            start = len(tokens)
            sequence = self._sequence(builder.request)
            cached = sequence.length
            mask: Tensor | None = None
            if first:
                tokens += builder.request.tokens[cached:]
                positions += range(cached, len(builder.request.tokens))
                wanted.append(len(tokens) - 1)
            else:
                draft, frontier = builder.draft, builder.frontier
                depths = draft.depths()
                tokens += [draft.tokens[node] for node in frontier]
                positions += [cached - 1 + depths[node] for node in frontier]
                builder.fed += frontier
                if self.parameters.width > 1:
                    paths = [set(draft.path(node)) for node in frontier]
                    mask = torch.tensor([[node in path for node in builder.fed] for path in paths])
                    mask = mask.to(self.model.device)
                wanted += range(start, len(tokens))
            spans.append(Span(sequence, start, len(tokens), mask, extend=not first))
        device = self.model.device
        return Rows(torch.tensor(tokens, device=device), torch.tensor(positions, device=device), spans), wanted

    def _sequence(self, request: Request) -> CacheSequence:
        """The drafter's cache of a request: it holds committed tokens only, so it never has to be rolled back."""
        sequence = self._sequences.get(request.id)
        if sequence is None:
            sequence = self._sequences[request.id] = self.cache.sequence()
            sequence.reserve(len(request.tokens) + min(request.stopper.left, 512) + self.parameters.length)
        return sequence


class _Builder:
    """Grows the draft of one request."""

    def __init__(self, request: Request, parameters: DraftModelParameters, budget: int, room: int) -> None:
        self.request, self.parameters, self.budget = request, parameters, budget
        left = min(budget, request.stopper.left - 1, room - len(request.tokens))
        self.depth = min(parameters.length, left)
        self.draft = Draft()
        self.frontier: list[int] = [ROOT]
        self.fed: list[int] = []
        self.level = 0
        self._scores: dict[int, float] = {ROOT: 0.0}
        self._coins = request.sampler.coins(len(request.tokens), DRAFT_PURPOSE)

    @property
    def wanted(self) -> int:
        """Rows of logits the next `grow` takes: one per frontier node."""
        return len(self.frontier)

    def grow(self, logits: Tensor) -> None:
        """Add the children of the frontier, then choose the next frontier."""
        self.level += 1
        fresh: list[int] = []
        for node, (ids, likelihoods) in zip(self.frontier, self._children(logits), strict=True):
            for token, log_likelihood in zip(ids, likelihoods, strict=True):
                fresh.append(len(self.draft))
                self._scores[len(self.draft)] = self._scores[node] + log_likelihood
                self.draft.tokens.append(token)
                self.draft.parents.append(node)
        self.frontier = self._next_frontier(fresh)

    def _next_frontier(self, fresh: list[int]) -> list[int]:
        """The likeliest new nodes, as many as the width; none at full depth or where a chain has lost confidence."""
        if self.level >= self.depth or len(self.draft) >= self.budget or not fresh:
            return []
        likely = sorted(fresh, key=lambda node: -self._scores[node])[: self.parameters.width]
        if self.parameters.width == 1 and self._last_step(likely[0]) < self.parameters.confidence:
            return []
        return sorted(likely)

    def _last_step(self, node: int) -> float:
        """The drafter's probability of a node's token."""
        parent = self.draft.parents[node]
        return float(torch.exp(torch.tensor(self._scores[node] - self._scores[parent])))

    def _children(self, logits: Tensor) -> list[tuple[list[int], list[float]]]:
        """Per frontier node, its children's tokens in draw order and their log-probabilities."""
        sampler, params = self.request.sampler, self.request.params
        paths = [[self.draft.tokens[n] for n in self.draft.path(node)] for node in self.frontier]
        if params.greedy:
            logprobs = sampler.adjusted(logits, paths).log_softmax(-1)
            values, ids = logprobs.topk(min(self.parameters.width, logprobs.shape[1]), -1)
            return list(zip(ids.tolist(), values.tolist(), strict=True))
        distribution = sampler.distribution(logits, paths)
        if params.acceptance != "match":
            return [self._sampled(node, distribution.dense(row)) for row, node in enumerate(self.frontier)]
        logprobs = distribution.scores.log_softmax(-1)
        positions = [len(self.request.tokens) + len(path) for path in paths]
        width = min(self.parameters.width, logprobs.shape[1])
        columns = sampler.perturbed(distribution, positions).topk(width, -1).indices
        ids = columns if distribution.ids is None else distribution.ids.gather(1, columns)
        chosen: list[tuple[list[int], list[float]]] = []
        for row_ids, row_values in zip(ids.tolist(), logprobs.gather(1, columns).tolist(), strict=True):
            possible = [i for i, value in enumerate(row_values) if value > -torch.inf]
            chosen.append(([row_ids[i] for i in possible], [row_values[i] for i in possible]))
        return chosen

    def _sampled(self, node: int, q: Tensor) -> tuple[list[int], list[float]]:
        """Children drawn from q without replacement, by the drafter's own coins."""
        self.draft.drawn[node] = Drawn(q, replacement=False)
        ids: list[int] = []
        rest = q.clone()
        for _ in range(self.parameters.width):
            if float(rest.sum()) <= 0:
                break
            ids.append(draw(rest, self._coins.draw()))
            rest[ids[-1]] = 0
        return ids, [float(q[token].log()) for token in ids]
