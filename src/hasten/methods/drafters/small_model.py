"""What drafting with a small model needs, whatever the draft's shape: loading, caches, trees that grow in rounds.

A drafter that stands on this says how a draft grows (`Growth`); `SmallModelDrafter` keeps the small model's caches and
gives all growing drafts of a batch the logits they ask for, one forward pass per round.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from hasten.cache import Cache
from hasten.engine import ROOT, Draft, Drafter, Observation, Request, Target
from hasten.engine.memory import LOGIT_BYTES, logits_bytes
from hasten.engine.sampling.sampler import Distribution, Sampler, likeliest_of_model
from hasten.errors import UserError
from hasten.methods.drafters.drawing import Beliefs, Matching, likeliest, processed, sampled, sampled_bytes
from hasten.methods.drafters.sequences import Branches, Sequences
from hasten.methods.drafters.words import TOKEN_MAP, VOCABULARY, Words
from hasten.model import Decoder, Model, Rows, Span, load_model
from hasten.model.checkpoint import GGUF_SUFFIX, is_gguf, resolve
from hasten.model.decoder import NOT_FINITE
from hasten.model.loading import read_config
from hasten.model.tokenizer import load_tokenizer, same_vocabulary, vocabulary_digest

DRAFT_PURPOSE = 1
"""Coins of the drafter are another stream than the verifier's."""
READING = 256
"""Of what a request has, so many rows are read in one pass at most: what that takes for a while is bounded."""
PROBABILITIES, CHILD = 8, 16
"""Bytes per logit of what makes probabilities of a distribution, and per child that is looked at."""


_LOADED: WeakValueDictionary[tuple[str, ...], Model] = WeakValueDictionary()
"""Small models in use: specifications that name the same one share its weights, as long as any drafter holds it."""


@dataclass(frozen=True)
class SmallCheckpoint:
    """A small model that is to be loaded; arguments as of `hasten.model.load_model`."""

    folder: Path
    dtype: str
    device: str
    backend: str

    def load(self) -> Model:
        """The checkpoint as it is now: from memory where a drafter of this process has it."""
        files = [self.folder] if self.folder.is_file() else self.folder.iterdir()
        written = max(file.stat().st_mtime_ns for file in files if file.exists())
        key = (str(self.folder.resolve()), str(written), self.dtype, self.device, self.backend)
        model = _LOADED.get(key)
        if model is None:
            model = _LOADED[key] = load_model(self.folder, self.dtype, self.device, self.backend)
        return model


def own_name(checkpoint: Path, suffix: str) -> str:
    """The folder beside a checkpoint that is named like it with `-draft`, or another suffix."""
    return f"{checkpoint.with_suffix('') if checkpoint.is_file() else checkpoint}-{suffix}"


def beside(target: Target, suffix: str = "draft") -> str | None:
    """Where a target's own small model is looked for: the folder named like the target's with `-draft`.

    Beside a GGUF file `x.gguf` it is `x-draft`, or the file `x-draft.gguf` where there is one.

    Args:
        suffix: what stands there in place of `draft`.
    """
    if target.folder is None:
        return None
    name = own_name(Path(target.folder), suffix)
    return f"{name}{GGUF_SUFFIX}" if is_gguf(Path(f"{name}{GGUF_SUFFIX}")) else name


def is_whole(name: str) -> bool:
    """Whether a checkpoint is there: more than what a training that is not over has left."""
    return Path(name).is_file() or (Path(name) / "config.json").exists()


def find_small_model(slug: str, target: Target, name: str, dtype: str) -> SmallCheckpoint:
    """The small model, not loaded yet, after checking that it speaks the target's tokens.

    Args:
        slug: the method that asks, for messages.
        name: folder, GGUF file or hub id; `auto` is the one beside the target.
        dtype: of the weights.

    Raises:
        UserError: none found, another tokenizer, or fewer tokens than it has.
    """
    if name == "auto":
        own = beside(target)
        if own is None:
            raise UserError(f"{slug} needs a model: use {slug}:model=FOLDER")
        name = own
        if not is_whole(name):
            raise UserError(
                f"{slug} finds no drafter at {name}: name one ({slug}:model=FOLDER), or train one with "
                f"'hasten train align --model {target.folder}'"
            )
    folder = resolve(name)
    config = read_config(folder)
    if target.tokenizer is not None and not _same_tokens(folder, config.source, target.tokenizer):
        raise UserError(f"the drafter {name!r} has another tokenizer than the target; they must be the same")
    words = target.model.config.vocab_size
    if target.tokenizer is not None:
        # Models of one tokenizer may be padded to different sizes.
        words = min(words, 1 + max(target.tokenizer.get_vocab().values(), default=-1))
    if config.vocab_size < words and TOKEN_MAP not in config.source:
        size = f"{config.vocab_size} < {words}"
        raise UserError(f"the drafter {name!r} has a smaller vocabulary than the target ({size})")
    # As the target runs, where the small model can, too.
    backend = "torch" if getattr(getattr(target.model, "backend", None), "name", "torch") == "torch" else "auto"
    return SmallCheckpoint(folder, dtype, str(target.model.device), backend)


def load_small_model(slug: str, target: Target, name: str, dtype: str) -> Model:
    """The small model that `find_small_model` finds.

    Raises:
        UserError: it finds none, or a checkpoint that cannot be loaded.
    """
    return find_small_model(slug, target, name, dtype).load()


def _same_tokens(folder: Path, source: Mapping[str, Any], tokenizer: Any) -> bool:
    """Whether a small model's tokens are the target's, or some of them under numbers of their own."""
    if TOKEN_MAP in source:
        return bool(source.get(VOCABULARY) == vocabulary_digest(tokenizer))
    return same_vocabulary(load_tokenizer(folder), tokenizer)


class Growth(ABC):
    """The draft of one request while it grows.

    Subclasses write `grow`: given the logits of the `frontier` (at first the root's), add children and set the next
    frontier; an empty one ends the growth.

    Args:
        drafter: whose small model draws.
        request: the draft's.
        nodes, depth: limits; the depth is also kept within what may still come, and within the small model's context.

    Attributes:
        frontier: nodes whose logits come next.
        paths: tokens from the root's child down, per node and ROOT.
        values: probability of the path down to each node and ROOT: the product of its nodes'.
        rest: probability that is not yet taken by children, per node and ROOT.
        matching: its children with shared noise.
        closed: tokens that end the text: nothing is drafted below them.
        sampled: whether children are drawn by the drafter's own coins (otherwise they are given).
    """

    def __init__(self, drafter: SmallModelDrafter, request: Request, nodes: int, depth: int) -> None:
        self.drafter, self.request, self.nodes = drafter, request, nodes
        room = drafter.model.config.max_positions - drafter.length(request)
        self.depth = min(depth, request.stopper.left - 1, room)
        self.draft = Draft()
        self.frontier = [ROOT] if self.depth > 0 and nodes > 0 else []
        self.paths: dict[int, list[int]] = {ROOT: []}
        self.values = {ROOT: 1.0}
        self.rest = {ROOT: 1.0}
        self.matching = Matching(request, drafter.beliefs.of(request))
        self.sampled = not request.params.greedy and request.params.acceptance != "match"
        self.closed = request.params.endings(drafter.end_ids)
        self._branches = Branches()
        self._coins = request.sampler.coins(len(request.tokens), DRAFT_PURPOSE)

    @abstractmethod
    def grow(self, logits: Tensor) -> None:
        """Add children and choose the next frontier; `logits` are float32 [frontier, small vocabulary]."""

    def add(self, parent: int, token: int, probability: float) -> int:
        """Append a node and return its number.

        A given node's estimate is its path's probability. That of a sampled node is the probability that verification
        reaches it, which was known before the draw: whoever cuts by it cuts without having looked at the token.
        """
        node, value = len(self.draft), self.values[parent] * probability
        self.draft.tokens.append(token)
        self.draft.parents.append(parent)
        self.draft.estimates.append(self.values[parent] * self.rest[parent] if self.sampled else value)
        self.paths[node] = [*self.paths[parent], token]
        self.values[node], self.rest[node] = value, 1.0
        self.rest[parent] = max(0.0, self.rest[parent] - probability)
        return node

    def children(self, logits: Tensor, most: int) -> list[Iterator[tuple[int, float]]]:
        """Per frontier node, its possible children in draw order: (token, probability that it is the target's).

        Greedy requests get the likeliest; `match` the order that the target's own noise gives the drafter's
        distribution, and what `Belief` says of them; both end after `most`. With other rules children are drawn without
        replacement as they are asked for, so that one that was not asked for was never drawn; there and for greedy
        requests it is the drafter's own probability.

        Raises:
            UserError: the small model's logits are not finite.
        """
        paths = [self.paths[node] for node in self.frontier]
        searched = self.request.sampler.is_argmax
        if not searched:
            likeliest_of_model(logits)
        distribution = self.drafter.distribution(self.request, logits, paths)
        if self.sampled:
            # Where nothing is allowed there is no distribution, and no child.
            every, ids = distribution.scores.double().softmax(-1).nan_to_num(0.0).cpu(), distribution.ids
            return [
                sampled(self.draft, node, every[row], None if ids is None else ids[row].cpu(), self._coins)
                for row, node in enumerate(self.frontier)
            ]
        if self.request.params.greedy:
            rows = likeliest(distribution, most)
            # A model's own logits have a likeliest token; those that were adjusted may allow none.
            if searched and not all(rows):
                raise UserError(NOT_FINITE)
            return [iter(pairs) for pairs in rows]
        return self.matching.children(distribution, self.frontier, paths, most)

    def row(self, node: int) -> int | None:
        """The number of a node's pending row; None where it was not fed."""
        return self._branches.row(node)

    def feed(self) -> Tensor | None:
        """The frontier's mask behind the rows fed before, as `Branches.feed` gives it."""
        return self._branches.feed(self.frontier, self.draft.parents)


class SmallModelDrafter(Drafter):
    """Grows the drafts of a whole batch together. Subclasses say how each one starts.

    A request's cache holds committed tokens only, so it never has to be rolled back, and catches up by itself with
    whatever other drafters got accepted; the nodes of a draft are pending rows behind it, round after round.

    Attributes:
        words: the tokens that the small model drafts with, where they are not the target's, number by number.
    """

    def __init__(self, model: Model, end_ids: frozenset[int] = frozenset()) -> None:
        self.model, self.end_ids = model, end_ids
        self.cache = Cache(model.config.layers, model.cache_dtype, model.device)
        self._sequences = Sequences(self.cache, self.length)
        self.beliefs = Beliefs()
        self.words = Words.of(model.config, model.device)

    def start(self, request: Request, budget: int) -> Growth:
        """The seed of a request's draft of at most `budget` nodes."""
        raise NotImplementedError

    def distribution(self, request: Request, logits: Tensor, paths: Sequence[Sequence[int]]) -> Distribution:
        """The drafter's distribution over the target's tokens, from the small model's logits of some rows.

        Both may have more logits than there are tokens (padding), and not as many: tokens that the small model does not
        know are impossible.
        """
        if self.words is not None:
            return self.words.distribution(request, logits, paths)
        vocabulary = request.sampler.vocabulary
        logits = logits[:, :vocabulary]
        if logits.shape[1] < vocabulary:
            logits = pad(logits, (0, vocabulary - logits.shape[1]), value=-torch.inf)
        return processed(request.sampler, logits, paths)

    @property
    def memory_bytes(self) -> int:
        return self.cache.used_bytes + sum(self.weights.values())

    @property
    def weights(self) -> Mapping[int, int]:
        if not isinstance(self.model, Decoder):
            return {id(self.model): self.model.weight_bytes()}
        # By piece: a trimmed model has a head of its own, and the layers of the whole one.
        layers = {id(layer): layer.nbytes() for layer in self.model.layers}
        return {**layers, id(self.model.head): self.model.head.nbytes()}

    def growth_bytes(self, requests: Sequence[Request], rows: int = 0) -> int:
        return self._sequences.growth_bytes(requests)

    @property
    def vocabulary(self) -> int:
        """Logits of a row."""
        return self.model.config.vocab_size

    def widest(self, nodes: int) -> int:
        """Nodes of a draft of at most so many whose logits are asked for in one round, at most."""
        return nodes

    def scratch_bytes(self, requests: Sequence[Request], nodes: int) -> int:
        """The largest pass, a round's logits, what is made of one request's share of them, and what was drawn from."""
        if not requests or nodes < 1:
            return 0
        rows, vocabulary, samplers = self.widest(nodes), self.vocabulary, list(map(self._sampler, requests))
        wide = max(vocabulary, *(sampler.vocabulary for sampler in samplers))
        padding = wide * LOGIT_BYTES if wide > vocabulary else 0
        looking = rows * (wide * PROBABILITIES + padding + nodes * CHILD)
        looking += max(each.processing_bytes(rows) for each in samplers)
        drawn = sum(sampled_bytes(sampler, nodes, sampler.kept) for sampler in samplers)
        return len(requests) * logits_bytes(rows, vocabulary) + looking + drawn + self._pass_bytes(requests, nodes)

    def _pass_bytes(self, requests: Sequence[Request], nodes: int) -> int:
        """Of the model itself, when it reads what it has not seen of these requests, or a round of their nodes."""
        if not isinstance(self.model, Decoder):
            return 0
        slots = max(map(self.length, requests)) + nodes
        return max(
            self.model.scratch_bytes(self._unread(requests), 0, slots),
            self.model.scratch_bytes(len(requests) * self.widest(nodes), nodes, slots),
        )

    def _unread(self, requests: Sequence[Request]) -> int:
        """Rows of the largest pass that reads what was committed."""
        lengths = [sequence.length if (sequence := self._sequences.get(each.id)) else 0 for each in requests]
        unread = [self.length(each) - length for each, length in zip(requests, lengths, strict=True)]
        return sum(min(max(1, count), READING) for count in unread)

    def _sampler(self, request: Request) -> Sampler:
        """What processes the small model's logits for a request."""
        return request.sampler if self.words is None else self.words.sampler(request)

    def length(self, request: Request) -> int:
        """Tokens of the text that the small model reads of a request: by default all that the target reads."""
        return len(request.tokens)

    def text(self, request: Request, start: int, stop: int) -> list[int]:
        """Some tokens of that text; it ends as the target's does."""
        return request.tokens[start:stop]

    def observe(self, request: Request, seen: Observation) -> None:
        self.beliefs.observe(request, seen)

    def end(self, request: Request) -> None:
        self.beliefs.end(request)
        if self.words is not None:
            self.words.end(request)
        self._sequences.drop(request)

    def propose(self, request: Request, budget: int) -> Draft:
        return self.propose_all([request], [budget])[0]

    def propose_all(self, requests: Sequence[Request], budgets: Sequence[int]) -> list[Draft]:
        """Round by round; a request leaves the batch when its draft is complete."""
        growths = [self.start(request, budget) for request, budget in zip(requests, budgets, strict=True)]
        active = [growth for growth in growths if growth.frontier]
        evaluate = self._read
        while active:
            self._grow(active, evaluate(active))
            active = [growth for growth in active if growth.frontier]
            evaluate = self._expand
        for growth in growths:
            self.beliefs.drafted(growth.request, growth.matching, growth.draft)
        return [growth.draft for growth in growths]

    @staticmethod
    def _grow(growths: Sequence[Growth], logits: Tensor) -> None:
        """One round. Its logits are gone before the next one's are made."""
        offset = 0
        for growth in growths:
            stop = offset + len(growth.frontier)
            growth.grow(logits[offset:stop])
            offset = stop

    def _read(self, growths: Sequence[Growth]) -> Tensor:
        """Catch up with what was committed; logits behind the last token of each request."""
        for growth in growths:
            self._catch_up(growth.request)
        tokens: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        for growth in growths:
            sequence, length, start = self._sequences.of(growth.request), self.length(growth.request), len(tokens)
            if sequence.length == length:
                # Asked again about the same tokens: the last one is read anew for its logits.
                sequence.crop(length - 1)
            cached = sequence.length
            tokens += self._words(growth.request, cached, length)
            positions += range(cached, length)
            spans.append(Span(sequence, start, len(tokens)))
        logits = self._forward(tokens, positions, spans, [span.stop - 1 for span in spans])
        for growth, span in zip(growths, spans, strict=True):
            self._sequences.of(growth.request).commit(span.stop - span.start)
        return logits

    def _catch_up(self, request: Request) -> None:
        """Read the tokens that are not in the cache in pieces, but for the last `READING` of them."""
        sequence = self._sequences.of(request)
        while self.length(request) - sequence.length > READING:
            start, stop = sequence.length, sequence.length + READING
            self._forward(self._words(request, start, stop), list(range(start, stop)), [Span(sequence, 0, READING)], ())
            sequence.commit(READING)

    def _words(self, request: Request, start: int, stop: int) -> list[int]:
        """Some of a request's tokens. What says nothing to this model (another one's embeddings, tokens beyond its own)
        is some word to it."""
        tokens, known = self.text(request, start, stop), self.model.config.vocab_size
        if self.words is not None and self.words.unknown is not None:
            return self.words.read(tokens)
        if not request.spans and known >= request.sampler.vocabulary:
            return tokens
        return [token if 0 <= token < known else 0 for token in tokens]

    def _expand(self, growths: Sequence[Growth], heard: bool = True) -> Tensor:
        """Logits of all frontiers' nodes, which stay pending; without `heard`, of none."""
        tokens: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        for growth in growths:
            mask, start, root = growth.feed(), len(tokens), self.length(growth.request) - 1
            drafted = [growth.draft.tokens[node] for node in growth.frontier]
            tokens += drafted if self.words is None else self.words.read(drafted)
            positions += [root + len(growth.paths[node]) for node in growth.frontier]
            if mask is not None:
                mask = mask.to(self.model.device)
            spans.append(Span(self._sequences.of(growth.request), start, len(tokens), mask, extend=True))
        return self._forward(tokens, positions, spans, range(len(tokens)) if heard else (), drafted=True)

    def _forward(
        self, tokens: list[int], positions: list[int], spans: list[Span], wanted: Sequence[int], drafted: bool = False
    ) -> Tensor:
        device = self.model.device
        rows = Rows(torch.tensor(tokens, device=device), torch.tensor(positions, device=device), spans)
        return self.drafted(rows, wanted) if drafted else self.committed(rows, wanted)

    def drafted(self, rows: Rows, wanted: Sequence[int]) -> Tensor:
        """The pass over nodes of drafts; see `Model.forward`. By default as tokens of the text are read."""
        return self.committed(rows, wanted)

    def committed(self, rows: Rows, wanted: Sequence[int]) -> Tensor:
        """The pass over tokens of the text; see `Model.forward`."""
        return self.model.forward(rows, wanted)
