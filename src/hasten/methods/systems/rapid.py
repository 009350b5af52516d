"""RAPID: a drafter that reads only what a long prompt has to do with its question.

"Long-Context Inference with Retrieval-Augmented Speculative Decoding", 2025, arXiv 2502.20330. Behind a long context
even a small drafter is slow, as its own cache is read for each token. So the drafter gets a *shortened* prompt: the
chunks that a retriever finds (`retrieval.py`), in their order, with both ends of the prompt. Then the target itself
may be the drafter (`model=self`, the same weights and a second, short cache), or a small model.

Exactness: `rapid` is lossless: the target reads the whole prompt and verifies all. `rapid-transfer` is lossy, by intent:
where the drafter is surer, the target's distribution is moved towards its own before it judges (`Transfer`), since a
model may answer better from what was retrieved than from all. The paper's proof that this gives the target's
distribution holds without the move only; with it a token that both gain comes out more often than the target says it.

Different from the paper: chunks are of tokens, cut anywhere; the query is what stands at both ends of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hasten.engine import Drawn, Request, Target, Transfer, register
from hasten.errors import require
from hasten.methods.drafters.draft_model import DraftModel, DraftModelParameters, Levels
from hasten.methods.drafters.small_model import load_small_model
from hasten.methods.systems.retrieval import BM25, Encoder, Retriever, shortened
from hasten.model import Model

DRAWN = 24
"""Bytes per token of a distribution that is kept: itself, and its ids and sums while it is drawn from."""
HEAD = 32
"""Tokens at the beginning of a prompt that are always kept: what opens a chat, and what is asked for."""


@dataclass(frozen=True)
class RapidParameters(DraftModelParameters):
    """Parameters of the drafter.

    Attributes:
        model: `self` is the target; otherwise as in `draft-model`.
        least: tokens of a shortened prompt, at least; shorter prompts stay whole. The paper has 4096.
        ratio: a longer prompt is shortened to this fraction's denominator: 24 keeps a 24th, if that is more.
        chunk: tokens of each part that is kept or left out.
        query: tokens at the end of the prompt that are always kept, and asked with.
        encoder: a model of the package sentence-transformers; empty: BM25.

    Raises:
        UserError: out of range.
    """

    slug: ClassVar[str] = "rapid"

    model: str = "self"
    least: int = 512
    ratio: int = 24
    chunk: int = 64
    query: int = 96
    encoder: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = (
            (self.query >= 1, "query must be at least 1"),
            (1 <= self.chunk <= 4096, "chunk must be between 1 and 4096"),
            (self.ratio >= 1, "ratio must be at least 1"),
            (self.least > HEAD + self.query, f"least must be above {HEAD} and query, which are kept anyway"),
        )
        require(checks, "rapid")


@register(
    "rapid",
    family="systems",
    exactness="lossless",
    paper="2502.20330",
    title="RAPID: a drafter that reads what it retrieves of a long prompt",
    parameters=RapidParameters,
)
class Rapid(DraftModel):
    """Drafts for the whole batch together, behind each request's shortened prompt.

    State per request: the shortened prompt, and its cache.

    Raises:
        UserError: see `load_small_model` and `Encoder`.
    """

    parameters: RapidParameters

    def __init__(self, target: Target, parameters: RapidParameters) -> None:
        super().__init__(target, parameters)
        self._target = target.model
        self._contexts: dict[int, list[int]] = {}
        self._retriever: Retriever = Encoder(parameters.encoder, target.tokenizer) if parameters.encoder else BM25()

    def _load(self, target: Target, parameters: DraftModelParameters) -> Model:
        if parameters.model == "self":
            return target.model
        return load_small_model(parameters.slug, target, parameters.model, parameters.dtype)

    @property
    def weights(self) -> Mapping[int, int]:
        # The target's are not the drafter's.
        return {} if self.model is self._target else super().weights

    def begin(self, request: Request) -> None:
        parameters, prompt = self.parameters, request.tokens[: request.prompt_length]
        most = max(parameters.least, len(prompt) // parameters.ratio)
        self._contexts[request.id] = shortened(prompt, self._retriever, most, parameters.chunk, HEAD, parameters.query)

    def end(self, request: Request) -> None:
        super().end(request)
        self._contexts.pop(request.id, None)

    def extent(self, request: Request) -> int:
        context = self._contexts.get(request.id)
        return len(request.tokens) if context is None else len(context) + len(request.tokens) - request.prompt_length

    def context(self, request: Request) -> Sequence[int]:
        return [*self._contexts[request.id], *request.output]


@dataclass(frozen=True)
class TransferParameters(RapidParameters):
    """Parameters of the drafter.

    Attributes:
        strength: of the move: the paper's eta, 10 or 20 where the target drafts for itself, 40 or 50 for a larger drafter.
        tail: tokens of less than this share of the drafter's likeliest one are not moved.

    Raises:
        UserError: out of range.
    """

    slug: ClassVar[str] = "rapid-transfer"

    strength: float = 10.0
    tail: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = (
            (0 <= self.strength <= 100, "strength must be between 0 and 100"),
            (0 <= self.tail <= 1, "tail must be between 0 and 1"),
            (self.width == 1, "width must be 1: it judges chains"),
        )
        require(checks, self.slug)


@register(
    "rapid-transfer",
    family="systems",
    exactness="lossy",
    paper="2502.20330",
    title="RAPID: the target's answers, moved towards the retrieving drafter's",
    parameters=TransferParameters,
)
class RapidTransfer(Rapid):
    """Drafts as `rapid` does, drawn from distributions that verification is given."""

    plain_tokens = False
    parameters: TransferParameters

    def start(self, request: Request, budget: int) -> Levels:
        growth = _Drawn(self, request, budget, self.parameters)
        growth.draft.transfer = Transfer(self.parameters.strength, self.parameters.tail)
        return growth

    def scratch_bytes(self, requests: Sequence[Request], nodes: int) -> int:
        """What all nodes were drawn from stays until they are verified, beside what the base says."""
        kept = sum(min(nodes, self.parameters.levels) * DRAWN * request.sampler.vocabulary for request in requests)
        return super().scratch_bytes(requests, nodes) + kept


class _Drawn(Levels):
    """A chain of tokens that are drawn, whatever rule the request would choose; or, greedily, of the likeliest ones."""

    def __init__(self, drafter: RapidTransfer, request: Request, budget: int, parameters: TransferParameters) -> None:
        super().__init__(drafter, request, budget, parameters)
        self.sampled = not request.params.greedy

    def children(self, logits: Tensor, most: int) -> list[Iterator[tuple[int, float]]]:
        if self.request.params.greedy:
            paths = [self.paths[node] for node in self.frontier]
            scores = self.drafter.distribution(self.request, logits, paths).scores
            for node, each in zip(self.frontier, scores.double().softmax(-1).nan_to_num(0.0).cpu(), strict=True):
                self.draft.drawn[node] = Drawn(each)
        return super().children(logits, most)
