"""RAPID: a drafter that reads only what was retrieved from a long prompt, beside a target that reads all of it.

"Long-Context Inference with Retrieval-Augmented Speculative Decoding", 2025, arXiv 2502.20330, sections 3.1 and 3.2.
At a long context a step's time is that of reading keys and values. A drafter whose prompt is shortened to the chunks
that its end is about does not read them; so even the target itself is a cheap drafter (self-speculation), with a second
cache whose positions are its own. It drafts a chain until it is unsure; the chain is two tokens longer after one that
was accepted whole, else one shorter.

Exactness: lossless, as any drafter is. This is the paper's method without its transfer of the drafter's knowledge
(eta = 0), which changes the target's distribution: its appendix claims otherwise, but its proof needs the target to be
above the smaller of drafter and changed target everywhere, which is what the transfer is there to break.

Decisions where the paper leaves room: chunks are cut from token ids, at the end of a paragraph where one is near; the
query is the prompt's tail, since a prompt does not say where its question is; the default retriever is BM25 over token
ids (`retriever=NAME` takes a sentence encoder, as the paper does), and `least` is an eighth of theirs, for small
models. A prompt that is not shortened is drafted for by a `model` of its own only: the target itself would gain
nothing.

`rapid-transfer` is the paper's whole method, and lossy: see `hasten.engine.drafting.verification.transfer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from torch import Tensor

from hasten.engine import Drawn, Knob, Observation, Request, Target, register
from hasten.errors import UserError
from hasten.methods.drafters.retrieval import BM25, Retriever, SentenceEncoder, Shortening
from hasten.methods.drafters.small_model import Growth, SmallModelDrafter, load_small_model
from hasten.model import Model

SELF = "self"
"""As a model: the target itself."""
LONGER, SHORTER = 2, 1
"""Tokens that the next draft is longer or shorter by."""


@dataclass(frozen=True)
class RapidParameters:
    """Parameters of retrieval and drafting.

    Attributes:
        model: who drafts: the target itself, or a folder or hub id.
        dtype: of its weights, if it is another model.
        retriever: `bm25`, or a model of the sentence-transformers package.
        head, tail: tokens at the prompt's beginning and end that always stay; the tail is the query.
        chunk: tokens of a chunk.
        least: tokens of chunks, at least.
        share: of the prompt, if that is more.
        length: tokens of the first draft.
        most: of any.
        confidence: a draft ends before a token of less probability.

    Raises:
        UserError: out of range.
    """

    slug: ClassVar[str] = "rapid"

    model: str = SELF
    dtype: str = "auto"
    retriever: str = "bm25"
    head: int = 32
    tail: int = 96
    chunk: int = 128
    least: int = 512
    share: float = 1 / 24
    length: int = 10
    most: int = 16
    confidence: float = 0.1

    def __post_init__(self) -> None:
        if min(self.head, self.tail) < 1 or self.chunk < 4 or self.least < 0:
            raise UserError("rapid: head and tail must be positive, chunk at least 4, least not negative")
        if not 0 <= self.share < 1 or not 0 <= self.confidence <= 1:
            raise UserError("rapid: share and confidence must be between 0 and 1")
        if not 1 <= self.length <= self.most <= 64:
            raise UserError("rapid: length must be between 1 and most, which is 64 or less")

    @property
    def shortening(self) -> Shortening:
        return Shortening(self.head, self.tail, self.chunk, self.least, self.share)


@register(
    "rapid",
    family="drafters",
    exactness="lossless",
    paper="2502.20330",
    title="RAPID: drafts from what a long prompt's end is about",
    parameters=RapidParameters,
)
class Rapid(SmallModelDrafter):
    """Chains for all requests together; a short prompt, a cache and a length of draft per request."""

    def __init__(self, target: Target, parameters: RapidParameters) -> None:
        self.parameters, self._own = parameters, parameters.model != SELF
        super().__init__(self._load(target), target.end_ids)
        self._retriever = self._retrieve_by(target)
        self._ends = _paragraph_ends(target)
        self._short: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}

    def _load(self, target: Target) -> Model:
        if not self._own:
            return target.model
        return load_small_model(self.parameters.slug, target, self.parameters.model, self.parameters.dtype)

    def _retrieve_by(self, target: Target) -> Retriever:
        if self.parameters.retriever == "bm25":
            return BM25()
        if target.tokenizer is None:
            raise UserError("rapid: an encoder reads text, and this model has no tokenizer")
        return SentenceEncoder(self.parameters.retriever, lambda ids: str(target.tokenizer.decode(ids)))

    @property
    def weights(self) -> Mapping[int, int]:
        return super().weights if self._own else {}

    def _prompt(self, request: Request) -> list[int]:
        """The short prompt, made when it is first asked for."""
        short = self._short.get(request.id)
        if short is None:
            prompt = request.tokens[: request.prompt_length]
            # Embeddings stand for no text.
            short = prompt if request.spans else self._shortened(prompt)
            self._short[request.id] = short
        return short

    def _shortened(self, prompt: Sequence[int]) -> list[int]:
        return self.parameters.shortening.shorten(prompt, self._retriever, self._ends)

    def length(self, request: Request) -> int:
        return len(request.tokens) - request.prompt_length + len(self._prompt(request))

    def text(self, request: Request, start: int, stop: int) -> list[int]:
        short = self._prompt(request)
        beyond = request.prompt_length - len(short)
        return [*short[start:stop], *request.tokens[max(start, len(short)) + beyond : max(stop, len(short)) + beyond]]

    def start(self, request: Request, budget: int) -> Growth:
        useful = self._own or len(self._prompt(request)) < request.prompt_length
        nodes = min(budget, self._lengths.get(request.id, self.parameters.length)) if useful else 0
        return _Chain(self, request, nodes, self.parameters.confidence)

    def widest(self, nodes: int) -> int:
        return min(nodes, 1)

    def observe(self, request: Request, seen: Observation) -> None:
        super().observe(request, seen)
        if seen.draft:
            now = self._lengths.get(request.id, self.parameters.length)
            change = LONGER if len(seen.path) == len(seen.draft) else -SHORTER
            self._lengths[request.id] = min(max(1, now + change), self.parameters.most)

    def end(self, request: Request) -> None:
        super().end(request)
        self._short.pop(request.id, None)
        self._lengths.pop(request.id, None)


class _Chain(Growth):
    """One token after the other, until one is unlikely."""

    def __init__(self, drafter: SmallModelDrafter, request: Request, nodes: int, confidence: float) -> None:
        super().__init__(drafter, request, nodes, nodes)
        self.confidence = confidence

    def grow(self, logits: Tensor) -> None:
        parent, child = self.frontier[0], next(self.children(logits, 1)[0], None)
        if self.draft.transfer and not self.sampled:
            scores = self.drafter.distribution(self.request, logits, [self.paths[parent]]).scores[0]
            self.draft.drawn[parent] = Drawn(scores.double().softmax(-1).cpu(), replacement=False)
        self.frontier = []
        # A token that was sampled is drafted whatever its probability is: leaving it out would favour others.
        if child is None or (child[1] < self.confidence and not self.sampled):
            return
        node = self.add(parent, *child)
        going_on = child[1] >= self.confidence and child[0] not in self.closed
        if going_on and len(self.draft) < min(self.nodes, self.depth):
            self.frontier = [node]


@dataclass(frozen=True)
class TransferParameters(RapidParameters):
    """Attributes beside those of `rapid`: eta, how far the target follows the drafter.

    Raises:
        UserError: out of range.
    """

    slug: ClassVar[str] = "rapid-transfer"

    eta: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.eta <= 100:
            raise UserError("rapid-transfer: eta must be positive, and 100 at most; without it, use rapid")


@register(
    "rapid-transfer",
    family="drafters",
    exactness="lossy",
    paper="2502.20330",
    title="RAPID with transfer: what was retrieved has a say",
    parameters=TransferParameters,
    knob=Knob("eta", (1.0, 5.0, 10.0, 20.0, 40.0)),
)
class RapidTransfer(Rapid):
    """Its chains say what they were drawn from, greedy ones too."""

    alone = True

    def __init__(self, target: Target, parameters: TransferParameters) -> None:
        super().__init__(target, parameters)
        self._eta = parameters.eta

    def start(self, request: Request, budget: int) -> Growth:
        growth = super().start(request, budget)
        growth.draft.transfer, growth.sampled = self._eta, not request.params.greedy
        return growth


def _paragraph_ends(target: Target) -> Callable[[int], bool]:
    """Whether a token ends a line."""

    @cache
    def ends(token: int) -> bool:
        return target.tokenizer is not None and "\n" in str(target.tokenizer.decode([token]))

    return ends
