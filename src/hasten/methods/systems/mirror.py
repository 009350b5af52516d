"""Mirror-SD: the drafter prepares the next window while the target still verifies this one.

"Mirror Speculative Decoding: Breaking the Serial Barrier in LLM Inference", 2025, arXiv 2510.13161. Speculative
decoding is serial: draft, verify, draft. Here the target tells the drafter at a middle layer what it will probably say
behind each row of the window (final norm and head on what enters that layer, the likeliest `width` tokens), and goes
on. The drafter, a process on a core of its own, continues all of these *candidates* (`rollouts.py`). When the verdict
comes, the chain behind the token that it ends with is the next window; where that was no candidate, the drafter starts
anew (a *miss*). So a step takes

    T[layers below] + T[candidates] + max(T[layers above], T[chains]) + misses * T[window] + T[rendezvous]

which `Clock` measures, term by term. Only tokens pass between the processes.

Exactness: lossless. A chain is deterministic, and what is accepted is what the target says itself: greedily or by its
own keyed noise, which the drafter uses, too. So with `acceptance="max"` it is matched all the same, as in the paper.

Different from the paper:
- A verdict that comes before the chains are ready is obeyed at once: only its own chain is finished.
- Chains end where the drafter is not sure (`confidence`), as those of `draft-model` do, which is its serial baseline.
- Candidates are what the middle layer makes of the request's own sampling: of grammar, bias, penalties, and noise.
- A drafter with streams (`streams.py`) says what it says without them, in fewer passes; how many streams a pass has is
  decided by its rows.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from hasten.engine import Draft, Drafter, Observation, Request, Target, register
from hasten.engine.memory import logits_bytes
from hasten.errors import UserError, require
from hasten.methods.drafters.drawing import likeliest, processed
from hasten.methods.drafters.small_model import find_small_model
from hasten.methods.systems.chains import Window
from hasten.methods.systems.clock import Clock
from hasten.methods.systems.executors import Executor, Inline, Process, Setup
from hasten.methods.systems.rollouts import Opening, Spent
from hasten.methods.systems.streams import MOST
from hasten.model import Decoder
from hasten.model.threads import cores, spare_cores

CANDIDATE_ROWS = 64
"""Candidates per row, times requests, at most: the paper has 8 for up to 8 requests, then fewer."""
NOTHING = 0, 0
"""What is known to a drafter that has not heard of a request: no generation, no tokens."""
CAN_START = sys.platform != "win32"
"""Whether another process can be given a socket."""
CANDIDATE = 32
"""Bytes per logit of what is made of a row of the middle layer's."""


@dataclass(frozen=True)
class MirrorParameters:
    """Parameters of the drafter.

    Attributes:
        model: folder or hub id; `auto` looks for a sibling folder named like the target's with `-draft`.
        length: tokens of a window, at most.
        width: candidates behind each row of it. The paper has 8, on a device of its own.
        layer: what enters this layer of the target tells the candidates; 0 is the middle.
        confidence: a chain ends when the drafter gives all of it together less probability than this.
        executor: `process`, `inline` (no second process: the same tokens, nothing overlaps), or `auto`: a process
            where there are cores beside those that the model computes on.
        cores: of the drafter's process, the last of those that this process may use.
        pin: whether it is kept there.
        dtype: of the drafter's weights.
        streams: of the drafter that guess further tokens in each of its passes, at most; it may have none.

    Raises:
        UserError: out of range.
    """

    model: str = "auto"
    length: int = 7
    width: int = 4
    layer: int = 0
    confidence: float = 0.4
    executor: str = "auto"
    cores: int = 1
    pin: bool = True
    dtype: str = "auto"
    streams: int = MOST

    def __post_init__(self) -> None:
        checks = (
            (1 <= self.length <= 16, "length must be between 1 and 16"),
            (1 <= self.width <= 16, "width must be between 1 and 16"),
            (self.layer >= 0, "layer must not be negative"),
            (0 <= self.confidence <= 1, "confidence must be between 0 and 1"),
            (self.executor in ("auto", "process", "inline"), "executor must be auto, process or inline"),
            (self.cores >= 1, "cores must be at least 1"),
            (0 <= self.streams <= MOST, f"streams must be between 0 and {MOST}"),
        )
        require(checks, "mirror-sd")


@register(
    "mirror-sd",
    family="systems",
    exactness="lossless",
    paper="2510.13161",
    title="Mirror-SD: a process drafts while the target verifies",
    parameters=MirrorParameters,
    beside=1,
)
class Mirror(Drafter):
    """Drafts for the whole batch together.

    Attributes:
        clock: of all steps so far.

    Raises:
        UserError: the model has no middle, no drafter is found, or there can be no second process.
    """

    alone = True

    def __init__(self, target: Target, parameters: MirrorParameters) -> None:
        if not isinstance(target.model, Decoder) or len(target.model.layers) < 2:
            raise UserError("mirror-sd: needs a transformer of two layers or more, since it looks between them")
        self.parameters = parameters
        self.early = parameters.layer or len(target.model.layers) // 2
        if self.early >= len(target.model.layers):
            raise UserError(f"mirror-sd: layer must be below {len(target.model.layers)}, the layers of the model")
        self._model = target.model
        self.executor = self._executor(target, parameters)
        self.clock = Clock()
        self._known: dict[int, tuple[int, int]] = {}
        self._times: list[float] = []
        self._candidates: dict[int, list[list[int]]] = {}

    def _executor(self, target: Target, parameters: MirrorParameters) -> Executor:
        checkpoint = find_small_model("mirror-sd", target, parameters.model, parameters.dtype)
        mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(cores()))
        if parameters.executor == "process" and not CAN_START:
            raise UserError("mirror-sd: this system has no sockets to share with a process: use executor=inline")
        own = tuple(mine[-parameters.cores :])
        length, confidence, width = parameters.length, parameters.confidence, parameters.width
        spelled = checkpoint.folder if target.folder is None else Path(target.folder)
        sizes = length, confidence, width, own, parameters.pin, parameters.streams
        setup = Setup(checkpoint, spelled, target.end_ids, *sizes)
        shares = spare_cores() >= parameters.cores and CAN_START
        if parameters.executor == "process" or (parameters.executor == "auto" and shares):
            return Process(setup)
        return Inline(setup.rollouts())

    def prepare(self) -> None:
        self.executor.start()

    # Memory. That of the drafter's process counts, too.

    @property
    def memory_bytes(self) -> int:
        return int(self.executor.ask("held")) if self.executor.generation else 0

    @property
    def weights(self) -> Mapping[int, int]:
        rollouts = self.executor.rollouts
        return {} if rollouts is None else rollouts.weights

    def growth_bytes(self, requests: Sequence[Request], rows: int = 0) -> int:
        asked = [(request.id, len(request.tokens), request.stopper.left) for request in requests]
        return int(self.executor.ask("growth", asked)) if self.executor.generation else 0

    def scratch_bytes(self, requests: Sequence[Request], nodes: int) -> int:
        """The middle layer's logits and what is made of them, and what the drafter needs."""
        if not self.executor.generation or not requests:
            return 0
        rows, vocabulary = len(requests) * (self.parameters.length + 1), self._model.config.vocab_size
        looking = logits_bytes(rows, vocabulary) + rows * vocabulary * CANDIDATE
        looking += max(request.sampler.processing_bytes(rows) for request in requests)
        return looking + int(self.executor.ask("scratch", [request.id for request in requests], nodes))

    # Drafting

    def propose(self, request: Request, budget: int) -> Draft:
        return self.propose_all([request], [budget])[0]

    def propose_all(self, requests: Sequence[Request], budgets: Sequence[int]) -> list[Draft]:
        asked_at = time.perf_counter()
        came = [self._came(each) for each in requests]
        places = [self._place(*each) for each in came]
        # Where this fails, nobody knows what the drafter has made of it: it will be told all again.
        self._known.update({request.id: NOTHING for request in requests})
        answer: tuple[list[Window], Spent] = self.executor.ask("windows", came)
        windows, spent = answer
        self._known.update({request.id: self._now(request) for request in requests})
        self._tick(asked_at, spent, windows, places)
        return [
            Draft.chain(window.tokens[:budget], window.estimates[:budget])
            for window, budget in zip(windows, budgets, strict=True)
        ]

    def _came(self, request: Request) -> tuple[int, list[int]]:
        """What the drafter does not know of a request yet; a drafter that has never heard of it is told all."""
        generation, told = self._known.get(request.id, NOTHING)
        if generation != self.executor.generation:
            self.executor.tell("open", Opening.of(request))
            told = request.prompt_length
        return request.id, request.tokens[told:]

    def _place(self, request: int, came: Sequence[int]) -> int | None:
        """Where the token that ended a request's window stood among the candidates behind what was accepted."""
        rows = self._candidates.pop(request, [])
        behind = rows[len(came) - 1] if 0 < len(came) <= len(rows) else []
        return behind.index(came[-1]) if came and came[-1] in behind else None

    def _now(self, request: Request) -> tuple[int, int]:
        """What the drafter knows of a request behind being asked: which drafter, how many tokens."""
        return self.executor.generation, len(request.tokens)

    def glimpse(self, requests: Sequence[Request], drafts: Sequence[Draft], states: Sequence[Tensor]) -> None:
        """Tell the drafter what the middle layer takes for the target's answers."""
        came_at = time.perf_counter()
        # Nobody asks for a draft where one token more is the last; then there is no window to go on from.
        asked = [
            each
            for each in zip(requests, drafts, states, strict=True)
            if self._known.get(each[0].id) == self._now(each[0])
        ]
        if not asked:
            return
        width = max(1, min(self.parameters.width, CANDIDATE_ROWS // len(asked)))
        logits = self._model.logits(torch.cat([rows for _, _, rows in asked]), None)
        messages, start = [], 0
        for request, draft, rows in asked:
            stop = start + len(rows)
            messages.append((request.id, self.candidates(request, draft, logits[start:stop], width)))
            start = stop
        self._candidates.update(messages)
        self.executor.tell("branch", messages)
        self._times = [*self._times[:1], came_at, time.perf_counter()]

    @staticmethod
    def candidates(request: Request, draft: Draft, logits: Tensor, width: int) -> list[list[int]]:
        """Behind each row the likeliest tokens, without the one that stands there: that would be no end of the window.

        Args:
            logits: of the middle layer, float32 [nodes + 1, vocabulary].
        """
        sampler, tokens = request.sampler, draft.tokens
        paths = [tokens[:row] for row in range(len(tokens) + 1)]
        distribution = processed(sampler, logits, paths)
        if request.params.greedy:
            ranked = [[token for token, _ in row] for row in likeliest(distribution, width + 1)]
        else:
            perturbed = sampler.perturbed(distribution, [len(request.tokens) + row for row in range(len(paths))])
            best = perturbed.topk(min(width + 1, perturbed.shape[1]), -1).indices
            ranked = (best if distribution.ids is None else distribution.ids.gather(1, best)).tolist()
        drafted: list[int | None] = [*tokens, None]
        return [
            list(islice((token for token in row if token != stands), width))
            for row, stands in zip(ranked, drafted, strict=True)
        ]

    def end(self, request: Request) -> None:
        self._times = []
        self._candidates.pop(request.id, None)
        if self._known.pop(request.id, None) is not None and self.executor.generation:
            self.executor.tell("close", request.id)

    def observe(self, request: Request, seen: Observation) -> None:
        """Nothing: what came is read off the request when it is asked for."""

    def _tick(self, asked_at: float, spent: Spent, windows: Sequence[Window], places: Sequence[int | None]) -> None:
        """The step between the last window and this one, if there was one, is over."""
        now, clock = time.perf_counter(), self.clock
        if len(self._times) == 3:
            began, looked, told = self._times
            clock.steps += 1
            clock.windows += len(windows)
            clock.hits += sum(window.source == "hit" for window in windows)
            clock.places.update(place for place in places if place is not None)
            clock.below += looked - began
            clock.looking += told - looked
            clock.above += asked_at - told
            clock.rolling += spent.rollouts
            clock.fallback += spent.fallback
            clock.passes += spent.passes
            clock.overlapped += max(asked_at - told, spent.rollouts)
            clock.waiting += now - asked_at
            clock.step += now - began
        self._times = [now]
