"""Speculative decoding with a smaller model of the same tokenizer, as a chain or a tree.

Leviathan et al. 2211.17192 and Chen et al. 2302.01318 (chain), SpecInfer 2305.09781 and Sequoia 2402.12374 (trees).
Exactness: lossless. With the default acceptance the drafter draws with the target's own keyed noise, so its
sampled proposals agree with the target's draw as often as the two distributions allow; with `acceptance="max"` it
draws from its own coins and hands over q (rule B for a chain, D for a tree).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from torch import Tensor

from hasten.engine import Draft, Request, Target, register
from hasten.errors import UserError
from hasten.methods.drafters.small_model import Growth, SmallModelDrafter, load_small_model
from hasten.model import Decoder, Model
from hasten.model.native.backend import runs
from hasten.model.native.drafting import chain


@dataclass(frozen=True)
class DraftModelParameters:
    """Parameters of the drafter.

    Attributes:
        model: folder or hub id; `auto` looks for a sibling folder named like the target's with `-draft`.
        length: levels of the draft; 0 is 16 for a chain, which ends by its confidence, and 5 for a tree.
        width: children per expanded node, and nodes expanded per level; 1 is a chain.
        confidence: a chain ends when the drafter gives all of it together less probability than this.
        dtype: of the drafter's weights.

    Raises:
        UserError: out of range.
    """

    slug: ClassVar[str] = "draft-model"

    model: str = "auto"
    length: int = 0
    width: int = 1
    confidence: float = 0.4
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.length <= 32:
            raise UserError(f"{self.slug}: length must be between 1 and 32, or 0 to choose it")
        if not 1 <= self.width <= 8:
            raise UserError(f"{self.slug}: width must be between 1 and 8")
        if not 0 <= self.confidence <= 1:
            raise UserError(f"{self.slug}: confidence must be between 0 and 1")

    @property
    def levels(self) -> int:
        """`length`, chosen if need be."""
        return self.length or (16 if self.width == 1 else 5)


@register(
    "draft-model",
    family="drafters",
    exactness="lossless",
    paper="2211.17192",
    title="Speculation with a smaller model, chain or tree",
    parameters=DraftModelParameters,
)
class DraftModel(SmallModelDrafter):
    """Drafts for the whole batch together: one forward of the small model per level.

    Attributes:
        plain_tokens: whether the small model reads what its head says, number by number, and all of it does so.
    """

    plain_tokens: ClassVar[bool] = True

    def __init__(self, target: Target, parameters: DraftModelParameters) -> None:
        super().__init__(self._load(target, parameters), target.end_ids)
        self.parameters = parameters

    def _load(self, target: Target, parameters: DraftModelParameters) -> Model:
        return load_small_model(parameters.slug, target, parameters.model, parameters.dtype)

    def widest(self, nodes: int) -> int:
        return min(nodes, self.parameters.width)

    def start(self, request: Request, budget: int) -> Levels:
        return Levels(self, request, budget, self.parameters)

    def propose_all(self, requests: Sequence[Request], budgets: Sequence[int]) -> list[Draft]:
        """As the base says; the greedy chain of a lone request is one native call, where the model runs natively."""
        model = self.model
        if (
            len(requests) > 1
            or self.parameters.width > 1
            or not self.plain_tokens
            or not requests[0].sampler.is_argmax
            or not isinstance(model, Decoder)
            or not runs(model)
        ):
            return super().propose_all(requests, budgets)
        request, growth = requests[0], self.start(requests[0], budgets[0])
        if growth.frontier:
            growth.grow(self._read([growth]))
        if growth.frontier:
            sequence, most = self._sequences.of(request), min(growth.depth, growth.nodes) - 1
            first, words = growth.draft.tokens[0], self.words
            vocabulary = min(request.sampler.vocabulary, model.config.vocab_size) if words is None else len(words)
            if words is not None:
                first = words.number_of[first]
            links = chain(
                model, sequence, first, self.length(request), vocabulary, most, growth.confidence / growth.values[0]
            )
            for number, probability in links:
                token = number if words is None else int(words.tokens[number])
                growth.add(len(growth.draft) - 1, token, probability)
                if token in growth.closed:
                    break
        return [growth.draft]


class Levels(Growth):
    """Level by level, as many nodes expanded on each as the width says."""

    def __init__(self, drafter: DraftModel, request: Request, budget: int, parameters: DraftModelParameters) -> None:
        super().__init__(drafter, request, budget, parameters.levels)
        self.width, self.confidence = parameters.width, parameters.confidence

    def grow(self, logits: Tensor) -> None:
        fresh: list[int] = []
        for node, children in zip(self.frontier, self.children(logits, self.width), strict=True):
            for token, probability in islice(children, min(self.width, self.nodes - len(self.draft))):
                fresh.append(self.add(node, token, probability))
        self.frontier = self._next_frontier(fresh)

    def _next_frontier(self, fresh: list[int]) -> list[int]:
        """The likeliest new nodes, as many as the width; none at full depth or where a chain has become unlikely."""
        fresh = [node for node in fresh if self.draft.tokens[node] not in self.closed]
        if not fresh or len(self.paths[fresh[0]]) >= self.depth or len(self.draft) >= self.nodes:
            return []
        likely = sorted(fresh, key=lambda node: -self.values[node])[: self.width]
        if self.width == 1 and self.values[likely[0]] < self.confidence:
            return []
        return sorted(likely)
