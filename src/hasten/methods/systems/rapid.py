"""RAPID: a drafter that reads only what a long prompt has to do with its question.

"Long-Context Inference with Retrieval-Augmented Speculative Decoding", 2025, arXiv 2502.20330. Behind a long context
even a small drafter is slow, as its own cache is read for each token. So the drafter gets a *shortened* prompt: the
chunks that a retriever finds (`retrieval.py`), in their order, with both ends of the prompt. Then the target itself
may be the drafter (`model=self`, the same weights and a second, short cache), or a small model.

Exactness: lossless. The target reads the whole prompt and verifies all. The paper's quality transfer, which moves the
target's distribution towards the drafter's (its eta above 0), is another method's text and is not here.

Different from the paper: chunks are of tokens, cut anywhere; the query is what stands at both ends of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from hasten.engine import Request, Target, register
from hasten.errors import require
from hasten.methods.drafters.draft_model import DraftModel, DraftModelParameters
from hasten.methods.drafters.small_model import load_small_model
from hasten.methods.systems.retrieval import BM25, Encoder, Retriever, shortened
from hasten.model import Model

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
