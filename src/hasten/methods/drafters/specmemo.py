"""SpecMemo: speculation within a budget of bytes.

Yildirim and Chen 2506.01986 ask two questions of speculative decoding on a small device: how few bytes suffice, and
what speed they leave. The abstract names the means: a model of the footprint, exact reservation of the KV cache instead
of the longest possible one, and a tree that is sized by what is left. The paper's text was not at hand: footprint,
admission and the solver for the tree's size are this module's own, and are held to the paper's two questions.

What counts: the KV cache of all requests of this method, the logits that verification looks at, what deciding on drafts
takes for a while, the masks of trees, and the drafter: what it holds (tables, caches, weights), and what it takes for a
while to draft (a small model's logits and passes). Weights and activations of the target do not; the latter are bounded
by the rows of a step (`Limits.rows`). The order in which things give way:

1. A request reserves exactly the slots that it may fill (prompt and `max_tokens`). One that does not fit even alone is
   refused; one that does not fit now waits. Without `max_tokens` nobody knows how many that are: the request reserves
   its text and half as much again, and more when it has outgrown that. Where there is no room, it gives all back, waits
   and is read again. Only a text that outgrows the whole budget fails.
2. Drafts take what is left: each step, the most nodes for which logits, masks and the drafter's own cache fit; none at
   all is plain decoding. A drafter's budget is known before it draws, so that sampled drafts stay unbiased.
3. A drafter that leaves no room for a request is given up, with what it has learned. It comes back with the next
   request that is added while there is room for it beside all that run or wait.

The sizes of Python tables are those that drafters estimate, what is taken for a while is a bound; the rest is exact.
Exactness: lossless, as its drafter is; with fewer nodes a step accepts less, never something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from hasten.cache import Cache
from hasten.cache.cache import MINIMUM_BLOCK
from hasten.engine import Draft, Drafter, Observation, Request, Target, register
from hasten.engine.creation import create, is_lossless
from hasten.engine.drafting.draft import MAX_DRAFT
from hasten.engine.memory import logits_bytes, mask_bytes, parse_bytes
from hasten.engine.registry import split
from hasten.engine.sampling.sampler import Sampler
from hasten.errors import UserError, require
from hasten.model.taps import Taps

AHEAD = 128
"""Slots that a request without `max_tokens` reserves beside its text, at the least."""


@dataclass(frozen=True)
class SpecMemoParameters:
    """Parameters.

    Attributes:
        budget: bytes, such as `64MiB`, for all requests of this method together.
        drafter: a specification, or several separated by `/`, of which the first that has something to say is heard.
        nodes: of a draft, at most.

    Raises:
        UserError: not a size, out of range, or a drafter that is lossy or specmemo itself.
    """

    budget: str = "1GiB"
    drafter: str = "token-recycling"
    nodes: int = 64

    def __post_init__(self) -> None:
        parse_bytes(self.budget, "specmemo: budget")
        slugs = [part.partition(":")[0] for part in split(self.drafter, "/")]
        require(
            (
                (1 <= self.nodes <= MAX_DRAFT, f"nodes must be between 1 and {MAX_DRAFT}"),
                ("specmemo" not in slugs, "it cannot be its own drafter"),
                (all(map(is_lossless, split(self.drafter, "/"))), f"{self.drafter} is lossy; it must be lossless"),
            ),
            "specmemo",
        )


@dataclass
class _Group:
    """The choices of one prompt, which share its cache: what they reserve, how they sample, and who is not over yet.

    Or one of them without `max_tokens`, which is `growing`, has reserved so many `slots`, and shares nothing.
    """

    kv: int
    rows: int
    sampler: Sampler
    members: set[int] = field(default_factory=set)
    growing: Request | None = None
    slots: int = 0


@dataclass
class _Inner:
    """The drafter while there is room for it, with the requests it has seen from their start.

    `bytes` is what it holds at most: what was measured, and all that it may have grown since.
    """

    drafter: Drafter
    requests: set[int] = field(default_factory=set)
    bytes: int = 0

    def measure(self, growth: int = 0) -> None:
        """Look at its size, to which comes what is about to grow; for some tables that takes time: where it matters."""
        self.bytes = self.drafter.memory_bytes + growth


@register(
    "specmemo",
    family="drafters",
    exactness="lossless",
    paper="2506.01986",
    title="SpecMemo: any drafter within a budget of bytes",
    parameters=SpecMemoParameters,
)
class SpecMemo(Drafter):
    """One budget per engine and specification."""

    alone = rations = True

    def __init__(self, target: Target, parameters: SpecMemoParameters) -> None:
        self.parameters, self._target = parameters, target
        self.budget = parse_bytes(parameters.budget, "specmemo: budget")
        self._vocabulary = target.model.config.vocab_size
        self._cache = Cache(target.model.config.layers, target.model.cache_dtype, target.model.device)
        self._groups: dict[int, _Group] = {}
        self._group_of: dict[int, int] = {}
        self._admitted: set[int] = set()
        self._begun: set[int] = set()
        self._inner: _Inner | None = self._fresh()
        self.taps = self._inner.drafter.taps
        self._least_drafter = self._inner.bytes
        if self._least_drafter > self.budget:
            self._inner = None

    def _fresh(self) -> _Inner:
        """The drafter as it begins."""
        inner = _Inner(create("+".join(split(self.parameters.drafter, "/")), self._target))
        inner.measure()
        return inner

    # What is held

    @property
    def memory_bytes(self) -> int:
        return 0 if self._inner is None else self._inner.drafter.memory_bytes

    def growth_bytes(self, requests: Sequence[Request], rows: int = 0) -> int:
        return 0 if self._inner is None else self._inner.drafter.growth_bytes(requests, rows)

    @property
    def reserved(self) -> int:
        """Bytes that running requests hold or may come to hold without any draft."""
        return sum(self._need(self._groups[number]) for number in self._admitted)

    @property
    def free(self) -> int:
        """Bytes left for drafts."""
        return self.budget - self.reserved - (0 if self._inner is None else self._inner.bytes)

    def _need(self, group: _Group) -> int:
        """Of plain decoding: the cache, a row of logits for each choice, and what drawing from one of them takes."""
        return group.kv + logits_bytes(group.rows, self._vocabulary) + group.sampler.scratch_bytes(1)

    def _makes_room(self, taken: int) -> bool:
        """Whether so many bytes more can be reserved; a drafter in their way is given up, what is reserved is not."""
        if taken > self.budget - self.reserved:
            return False
        if self._inner is not None and taken > self.free:
            self._inner.measure()
            if taken > self.free:
                self._inner = None
        return True

    # Requests

    def prepare(self) -> None:
        if self._inner is not None:
            self._inner.drafter.prepare()

    def headroom(self, request: Request) -> int:
        """Exactly what may still come, or what is reserved for it; at its end a tree has no more slots than that."""
        group = self._groups[self._group_of[request.id]]
        return request.stopper.left if group.growing is None else group.slots - len(request.tokens)

    def begin(self, request: Request) -> None:
        """Reserve in writing; a drafter that was given up comes back if it fits beside all requests.

        It is made here, where a request is added, since it may have to be loaded: a step must not wait for that.

        Raises:
            UserError: the request does not fit even alone and without drafts, or wants logits of its whole prompt, for
                which no memory is set aside.
        """
        if request.params.prompt_logprobs is not None:
            raise UserError(
                "specmemo keeps to a budget that has no room for prompt_logprobs: use another method for them"
            )
        slots, growing = len(request.tokens) + request.stopper.left, None
        if request.params.max_tokens is None:
            # It reads the prompt for itself, whatever choice it is: then it can give back what it holds.
            request.leader, growing = None, request
        number = request.id if request.leader is None else request.leader.id
        group = self._groups.setdefault(number, _Group(0, 0, request.sampler, growing=growing))
        if growing is None:
            # A choice beside the first shares the prompt's block, and fills one of its own.
            group.kv += self._cache.sequence_bytes(slots if not group.rows else request.stopper.left + 1)
        group.rows += 1
        group.members.add(request.id)
        self._group_of[request.id] = number
        self._set_aside(group)
        need = self._need(group)
        if need > self.budget:
            choices = f" and {group.rows} choices" if group.rows > 1 else ""
            raise UserError(
                f"specmemo: a prompt of {request.prompt_length} tokens with max_tokens {request.stopper.left}{choices} "
                f"needs {need:,} bytes, the budget is {self.budget:,}: lower max_tokens or raise the budget"
            )
        if self._inner is None and self._least_drafter + sum(map(self._need, self._groups.values())) <= self.budget:
            self._inner = self._fresh()

    def admits(self, request: Request) -> bool:
        """Whether the request fits, as it is now; a drafter in its way is given up, another request is not."""
        number = self._group_of[request.id]
        group = self._groups[number]
        if number not in self._admitted:
            self._set_aside(group)
            if not self._makes_room(self._need(group)):
                return False
            self._admitted.add(number)
        elif group.growing is not None and len(request.tokens) > group.slots:
            held = group.kv
            self._set_aside(group)
            # It is copied, so what it grows out of is held until then.
            if not self._makes_room(held):
                self._admitted.remove(number)
                return False
            with suppress(UserError):  # Where the engine's own cache is full, the engine finds room.
                request.sequence.reserve(group.slots - request.sequence.length)
        if request.id not in self._begun:
            self._begun.add(request.id)
            if self._inner is not None and self._grows(self._inner, [request]):
                self._inner.drafter.begin(request)
                self._inner.requests.add(request.id)
        return True

    def _set_aside(self, group: _Group) -> None:
        """Reserve for a text that grows as it is now, as far as that fits alone.

        Raises:
            UserError: it does not.
        """
        if group.growing is None:
            return
        known, left = len(group.growing.tokens), group.growing.stopper.left
        others = self._need(group) - group.kv
        need = others + self._cache.sequence_bytes(known)
        if need > self.budget:
            raise UserError(f"specmemo: a text of {known} tokens needs {need:,} bytes, the budget is {self.budget:,}")
        fitting = (self.budget - others) * MINIMUM_BLOCK // self._cache.sequence_bytes(MINIMUM_BLOCK)
        group.slots = min(known + min(left, max(AHEAD, known // 2)), fitting)
        group.kv = self._cache.sequence_bytes(group.slots)

    def end(self, request: Request) -> None:
        inner = self._inner
        if inner is not None and request.id in inner.requests:
            inner.requests.remove(request.id)
            if self._grows(inner, [request]):
                inner.drafter.end(request)
                inner.measure()
            else:
                # What it would learn from the request at its end does not fit.
                self._inner = None
        self._begun.discard(request.id)
        number = self._group_of.pop(request.id, None)
        if number is None:
            return
        group = self._groups[number]
        group.members.discard(request.id)
        if not group.members:
            del self._groups[number]
            self._admitted.discard(number)

    def _grows(self, inner: _Inner, requests: Sequence[Request], rows: int = 0) -> bool:
        """Let the drafter grow by what it may need for drafts or a verification; False where that does not fit."""
        grown = inner.drafter.growth_bytes(requests, rows)
        if grown > self.free:
            inner.measure()
        if grown > self.free:
            return False
        inner.bytes += grown
        return True

    # Drafts

    def propose(self, request: Request, budget: int) -> Draft:
        return self.propose_all([request], [budget])[0]

    def propose_all(self, requests: Sequence[Request], budgets: Sequence[int]) -> list[Draft]:
        """Drafts of as many nodes as fit, the same bound for all; none for requests that the drafter has not seen."""
        drafts = [Draft() for _ in requests]
        inner = self._inner
        if inner is None:
            return drafts
        seen = [index for index, request in enumerate(requests) if request.id in inner.requests]
        known = [requests[index] for index in seen]
        if not known or not self._grows(inner, known):
            return drafts
        most = self._nodes(inner, known)
        if most < self.parameters.nodes:
            inner.measure(inner.drafter.growth_bytes(known))
            most = self._nodes(inner, known)
        if most < 1:
            return drafts
        # The slots that are reserved for what may still come hold the draft, too.
        room = [min(each.stopper.left - 1, self.headroom(each)) for each in known]
        bounds = [min(most, budgets[index], slots) for index, slots in zip(seen, room, strict=True)]
        for index, bound, draft in zip(seen, bounds, inner.drafter.propose_all(known, bounds), strict=True):
            drafts[index] = draft.clamped(bound, MAX_DRAFT, self._vocabulary)
        return drafts

    def _nodes(self, inner: _Inner, requests: Sequence[Request]) -> int:
        """The most nodes for each of these requests' drafts that fit into what is free.

        Drafts are decided on one after the other, so what that takes for a while counts once.
        """
        free, drafts = self.free, len(requests)
        low, high = 0, self.parameters.nodes
        while low < high:
            middle = (low + high + 1) // 2
            scratch = max(request.sampler.scratch_bytes(middle) for request in requests)
            scratch += inner.drafter.scratch_bytes(requests, middle)
            taken = drafts * (logits_bytes(middle, self._vocabulary) + mask_bytes(middle)) + scratch
            low, high = (middle, high) if taken <= free else (low, middle - 1)
        return low

    def observe_prompt(self, request: Request, start: int, taps: Taps | None) -> None:
        if self._inner is not None and request.id in self._inner.requests:
            self._inner.drafter.observe_prompt(request, start, taps)

    def observe(self, request: Request, seen: Observation) -> None:
        """Show it to the drafter, unless what it would remember does not fit; it reads up on the tokens later."""
        inner = self._inner
        if inner is None or request.id not in inner.requests:
            return
        if inner.drafter.taps or self._grows(inner, [request], len(seen.draft) + 1):
            inner.drafter.observe(request, seen)
