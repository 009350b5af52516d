"""The one loop: schedule, propose, forward, verify, commit. Plain decoding is the empty draft on the same path."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hasten.cache import Cache, Prefixes
from hasten.engine import registry
from hasten.engine.canvas.denoiser import Denoiser
from hasten.engine.canvas.filling import Filling
from hasten.engine.decoding import Answer, TokenKind
from hasten.engine.drafting.draft import MAX_DRAFT, Draft
from hasten.engine.drafting.drafter import Drafter
from hasten.engine.drafting.speculation import Speculation
from hasten.engine.memory import Footprint, Ledger
from hasten.engine.passage import Passage
from hasten.engine.prompt import EMBEDDED, Segment, laid_out
from hasten.engine.request import Progress, Request
from hasten.engine.sampling.grammar import Grammars, GrammarState
from hasten.engine.sampling.params import SamplingParams
from hasten.engine.sampling.sampler import Sampler, likeliest_if_finite
from hasten.engine.scheduler import Limits, Scheduled, Scheduler
from hasten.engine.stopping import FinishReason, Stopper
from hasten.engine.turn import Turn
from hasten.errors import UserError
from hasten.model import Model, Rows, Span, Taps
from hasten.model.threads import refuse_fork

DRAFTERS = 16
"""Specifications whose drafters an engine keeps though no request uses them."""


class Engine:
    """Decodes requests of unequal length and method together.

    Any thread may add and abort requests and take steps: they get their turns one after the other.

    Args:
        model: a decoder or an oracle.
        tokenizer: for stop strings and text; may be None.
        end_ids: end-of-text token ids.
        limits: of batch and step.
        folder: the checkpoint's, for methods that want to know.
        cache_bytes: limit of the KV cache.
        prefix_bytes: of it, what texts may take that outlive their requests: a prompt that begins as one of them is not
            read again. Tenants share none; a drafter with taps reads all of its prompts.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Any = None,
        end_ids: Collection[int] = (),
        limits: Limits | None = None,
        folder: str | None = None,
        cache_bytes: int | None = None,
        prefix_bytes: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.end_ids = model, tokenizer, frozenset(end_ids)
        self.scheduler = Scheduler(limits or Limits())
        self.cache = Cache(model.config.layers, model.cache_dtype, model.device, cache_bytes)
        self.prefixes = Prefixes(prefix_bytes)
        self.target = registry.Target(model, tokenizer, folder, self.end_ids)
        self.ledger = Ledger()
        self._drafters: dict[str, Drafter] = {}
        self._grammars: Grammars | None = None
        self._next_id = 0
        self._turn = Turn()
        # Whose drafts wait for the next pass.
        self._late: list[Request] = []

    # Requests

    def drafter(self, method: str | Drafter) -> tuple[str, Drafter]:
        """The shared drafter of a specification, or a drafter object as it is.

        It is made once, and kept with what it learns as long as it is among the `DRAFTERS` used last, or in use.

        Raises:
            UserError: unknown, or not for this model.
        """
        if isinstance(method, Drafter):
            name, drafter = type(method).__name__, method
        else:
            known = method in self._drafters
            drafter = self._drafters.pop(method) if known else registry.create(method, self.target)
            name, self._drafters[method] = method, drafter
            if len(self._drafters) > DRAFTERS:
                used = {method, *(each.method for each in (*self.scheduler.running, *self.scheduler.waiting))}
                idle = [spec for spec in self._drafters if spec not in used]
                for spec in idle[: len(self._drafters) - DRAFTERS]:
                    del self._drafters[spec]
        config = self.model.config
        if isinstance(drafter, Denoiser) and config.diffusion is None:
            raise UserError(f"{name} needs a model that fills masked positions; this one predicts the next token")
        if not isinstance(drafter, Denoiser) and config.fills_canvas:
            raise UserError(f"{name} needs a model that predicts the next token; this one fills masked positions")
        return name, drafter

    def _grammar(self, params: SamplingParams) -> GrammarState | None:
        """A constraint's state at the start of a request."""
        if params.constraint is None:
            return None
        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer, self.model.config.vocab_size, self.end_ids)
        return self._grammars.start(params.constraint)

    def add(
        self,
        prompt: Sequence[Segment],
        params: SamplingParams,
        method: str | Drafter = "plain",
        read: bool = False,
    ) -> list[Request]:
        """Queue a prompt and return its choices (`params.n` requests).

        Args:
            prompt: token ids, and spans of embeddings; at least one.
            params: sampling, stopping, reporting.
            method: specification or drafter, for this prompt only.
            read: keep `Progress.text` up to date, and all progress in `Request.unread` (streaming).

        Raises:
            UserError: an empty prompt, ids outside the vocabulary (of prompt or logit_bias), embeddings that do not
                fit, no room left in the context, unknown method, a constraint that cannot be used; a forked process.
        """
        refuse_fork()
        with self._turn:
            return self._add(prompt, params, method, read)

    def _add(
        self, prompt: Sequence[Segment], params: SamplingParams, method: str | Drafter, read: bool
    ) -> list[Request]:
        config = self.model.config
        tokens, spans = laid_out(prompt, config.vocab_size, config.hidden_size, self.model.device)
        room = config.max_positions - len(tokens)
        if room <= 0:
            raise UserError(
                f"the prompt has {len(tokens)} tokens, which leaves no room in the context of {config.max_positions}"
            )
        if params.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer, and this model has none")
        if params.seed is None:
            params = replace(params, seed=random.getrandbits(63))
        name, drafter = self.drafter(method)
        words = [token for token in tokens if token != EMBEDDED]
        requests: list[Request] = []
        unread: deque[Progress] | None = deque() if read else None
        for choice in range(params.n):
            stopper = Stopper(params, self.end_ids, self.tokenizer, room, read)
            sequence = self.cache.sequence()
            request = Request(
                id=self._next_id,
                tokens=list(tokens),
                prompt_length=len(tokens),
                params=params,
                choice=choice,
                drafter=drafter,
                method=name,
                sequence=sequence,
                sampler=Sampler(params, choice, words, config.vocab_size, self._grammar(params)),
                stopper=stopper,
                spans=spans,
                leader=requests[0] if requests else None,
                unread=unread,
            )
            self._next_id += 1
            requests.append(request)
            if isinstance(drafter, Denoiser):
                request.leader, request.decoding = None, Filling(request, drafter, config, self.end_ids)
            elif request.leader is None:
                self._recall(request)
            self.scheduler.add(request)
        try:
            for request in requests:
                drafter.begin(request)
        except BaseException:
            for request in requests:
                self._end(request, "abort")
            raise
        return requests

    def _recall(self, request: Request) -> None:
        """Begin a request behind what an earlier text has in common with its prompt."""
        if not self.prefixes.limit_bytes or request.spans or request.drafter.taps:
            return
        sequence = self.prefixes.fork(request.params.tenant, request.tokens)
        if sequence is not None:
            request.sequence = sequence
            request.read = request.shown = request.statistics.recalled_rows = sequence.length

    def abort(self, request: Request) -> None:
        """End a request, at the latest after the step that another thread is taking; harmless if it has ended."""
        self._turn.later(lambda: self._end(request, "abort"))

    def _end(self, request: Request, reason: FinishReason) -> None:
        """End a request before its time."""
        if request.finish_reason is None:
            request.finish_reason = reason
            self._bequeath(request)
            self._finish(request)

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return len(self.scheduler) > 0

    def run(self) -> Iterator[Progress]:
        """Steps until nothing is left to do.

        Raises:
            whatever a request failed with.
        """
        while self.busy:
            for progress in self.step():
                if progress.request.error is not None:
                    raise progress.request.error
                yield progress

    # One step

    @torch.inference_mode()
    def step(self) -> list[Progress]:
        """One pass of the loop over everything that is scheduled.

        A request whose drafter, grammar or canvas fails, or by whose logits no token can be chosen, is over, with
        `Request.error`; the others go on.

        Raises:
            UserError: the KV cache is full. No request has changed: the step may be tried again when there is room.
        """
        with self._turn:
            return self._step()

    def _step(self) -> list[Progress]:
        progress = self._hold_back()
        plan = self.scheduler.plan()
        progress += self._propose([each.request for each in plan if not each.piece and each.request not in self._late])
        plan, passages, failed = self._place([each for each in plan if each.request.finish_reason is None])
        progress += failed
        if not plan:
            return progress
        started = time.perf_counter()
        rows, wanted = self._pack(plan, passages)
        taps = self._taps(plan)
        logits = self.model.forward(rows, wanted, taps)
        if self.model.config.diffusion is not None:
            # The mask is not a word: a text that says it would never be finished.
            logits[:, self.model.config.diffusion.mask_id] = -torch.inf
        best, finite = likeliest_if_finite(logits)
        forward_seconds = time.perf_counter() - started
        self._record(plan, rows, logits)

        stop = 0
        for scheduled, passage, span in zip(plan, passages, rows.spans, strict=True):
            request = scheduled.request
            request.statistics.forward_seconds += forward_seconds
            offset, stop = stop, stop + len(passage.wanted)
            first = span.stop - 1 if scheduled.piece else span.start
            hidden = _rows_of(taps, request.drafter, first, span.stop)
            answer = Answer(logits[offset:stop], best[offset:stop], finite[offset:stop], hidden, len(rows.tokens))
            if not scheduled.piece:
                progress += self._alone(request, self._decode, answer)
                continue
            progress += self._alone(request, self._read, span, taps)
            if passage.wanted and request.finish_reason is None:
                for choice in (request, *self._fork(request)):
                    progress += self._alone(choice, self._decode, answer)
        return progress

    def _alone(self, request: Request, work: Callable[..., list[Progress]], *arguments: Any) -> list[Progress]:
        """Do a request's part of a step; what goes wrong there ends that request only."""
        try:
            return work(request, *arguments)
        except Exception as error:
            return self._fail(request, error)
        except BaseException:
            # Half of the step has been taken.
            self._end(request, "abort")
            raise

    def _fail(self, request: Request, error: Exception) -> list[Progress]:
        """End a request that cannot go on."""
        request.error = error
        self._end(request, "error")
        return [self._progress(request, [], [])]

    def _progress(self, request: Request, tokens: list[int], kinds: list[TokenKind]) -> Progress:
        """Report what a step gave, to the stepping thread and to who reads along."""
        progress = Progress(request, tokens, kinds, request.stopper.fresh(), request.finish_reason)
        if request.unread is not None:
            request.unread.append(progress)
        return progress

    def _record(self, plan: Sequence[Scheduled], rows: Rows, logits: Tensor) -> None:
        """Enter the step into the ledger."""
        masks = sum(span.mask.nbytes for span in rows.spans if isinstance(span.mask, Tensor))
        self.ledger.record(Footprint(self.cache.used_bytes, logits.nbytes, masks))

    def _hold_back(self) -> list[Progress]:
        """Let those that run wait whose drafters do not let them go on; what became of them where that failed."""
        failed: list[Progress] = []
        # The last first: each comes to the head of the queue.
        for request in reversed(self.scheduler.running.copy()):
            failed += self._alone(request, self._ask)
        return failed

    def _ask(self, request: Request) -> list[Progress]:
        if not request.drafter.admits(request):
            self._preempt(request)
        return []

    def _preempt(self, request: Request) -> None:
        """Have a running request wait; its text will be read again."""
        self.scheduler.preempt(request)
        request.sequence.release()
        request.sequence, request.read = self.cache.sequence(), 0

    def _propose(self, requests: Sequence[Request]) -> list[Progress]:
        """Have drafts made, and canvases' first passages; what became of the requests where that failed."""
        groups: dict[int, list[Request]] = {}
        failed: list[Progress] = []
        for request in requests:
            if isinstance(request.decoding, Filling):
                failed += self._alone(request, self._look)
            elif request.stopper.left > 1:
                groups.setdefault(id(request.drafter), []).append(request)
        for group in groups.values():
            try:
                self._draft(*group)
            except Exception:
                # One by one, to know which of them it was.
                for request in group:
                    failed += self._alone(request, self._draft)
        return failed

    def _look(self, request: Request) -> list[Progress]:
        request.decoding.passage(request, 0)
        return []

    def _draft(self, *requests: Request) -> list[Progress]:
        """Clamped drafts for requests with one drafter."""
        started = time.perf_counter()
        # The target adds a token of its own, so a draft is never longer than what may come, less one.
        depths = [min(request.stopper.left - 1, MAX_DRAFT) for request in requests]
        proposed = requests[0].drafter.propose_all(requests, [MAX_DRAFT] * len(requests))
        seconds = (time.perf_counter() - started) / len(requests)
        for request, draft, depth in zip(requests, proposed, depths, strict=True):
            draft = draft.clamped(MAX_DRAFT, depth, self.model.config.vocab_size)
            if request.sampler.grammar is not None:
                draft = request.sampler.grammar.fit(draft)
            assert isinstance(request.decoding, Speculation)
            request.decoding.draft = draft
            request.statistics.draft_seconds += seconds
        return []

    def _place(self, plan: Sequence[Scheduled]) -> tuple[list[Scheduled], list[Passage], list[Progress]]:
        """Find room in the cache for the step's rows; where there is none, younger requests wait until there is.

        Returns:
            who takes part and with which passage; and what became of a request for which there never will be room.
        """
        placed: dict[int, tuple[Scheduled, Passage]] = {}
        refused: dict[int, tuple[Request, UserError]] = {}
        drafted, late = 0, self._late
        self._late = []
        for scheduled in sorted(plan, key=lambda each: each.request not in late) if late else plan:
            request = scheduled.request
            draft = 0 if scheduled.piece else request.decoding.drafted
            if draft and drafted and drafted + draft > self.scheduler.limits.draft_rows:
                self._late.append(request)
                continue
            drafted += draft
            while request in self.scheduler.running:
                try:
                    passage = request.decoding.passage(request, scheduled.piece)
                    self._make_room(request, len(passage.tokens))
                    placed[request.id] = scheduled, passage
                    break
                except UserError as error:
                    if self.prefixes.evict():
                        continue
                    if isinstance(request.decoding, Speculation) and request.decoding.draft:
                        # Before anybody makes place for it.
                        request.decoding.draft = Draft()
                        continue
                    victim = self._victim(request)
                    if victim is None:
                        refused[request.id] = request, error
                        break
                    placed.pop(victim.id, None)
                    self._preempt(victim)
        failed = []
        if refused and not placed:
            # Nobody will give back what the youngest of them waits for.
            failed = self._fail(*refused[max(refused)])
        return [each for each, _ in placed.values()], [passage for _, passage in placed.values()], failed

    def _make_room(self, request: Request, rows: int) -> None:
        """Room for a pass; when a request begins, for all that is known of it, and what may come as far as that fits.

        Raises:
            UserError: the cache is full.
        """
        if request.read <= request.prompt_length:
            begun_at = (0, request.statistics.recalled_rows, request.prompt_length)
            if request.read in begun_at if isinstance(request.decoding, Speculation) else not request.sequence.length:
                known = max(rows, request.decoding.slots(request))
                request.sequence.reserve(known, request.drafter.headroom(request))
        if self.cache.limit_bytes is not None:
            request.sequence.make_room(rows)

    def _victim(self, request: Request) -> Request | None:
        """Who gives back its slots and is read again, to make place for a request: the youngest, or that one itself.

        One that only begins takes nobody's place. One that runs alone begins anew if that is all it takes: a block that
        is outgrown needs place beside its successor.
        """
        others = [each for each in self.scheduler.running if each is not request and each.sequence.blocks()]
        again = [each for each in (*others, request) if isinstance(each.decoding, Speculation)]
        if others and request.sequence.length and again:
            return max(again, key=lambda each: each.id)
        fits = others or self.cache.fits(len(request.tokens) + 1)
        return request if request in again and fits and (others or request.sequence.length) else None

    def _pack(self, plan: Sequence[Scheduled], passages: Sequence[Passage]) -> tuple[Rows, list[int]]:
        """All rows of the step, and the numbers of those whose logits are wanted."""
        tokens: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        wanted: list[int] = []
        device = self.model.device
        for scheduled, passage in zip(plan, passages, strict=True):
            start = len(tokens)
            tokens += passage.tokens
            positions += passage.positions
            wanted += [start + row for row in passage.wanted]
            mask = passage.mask.to(device) if isinstance(passage.mask, Tensor) else passage.mask
            spans.append(Span(scheduled.request.sequence, start, len(tokens), mask))
        numbers = torch.tensor([tokens, positions], device=device)
        embeddings = None
        if any(passage.embedded for passage in passages):
            embeddings = torch.zeros(len(tokens), self.model.config.hidden_size, device=device)
            for span, passage in zip(spans, passages, strict=True):
                for first, states in passage.embedded:
                    embeddings[span.start + first : span.start + first + len(states)] = states
        return Rows(numbers[0], numbers[1], spans, embeddings), wanted

    def _taps(self, plan: Sequence[Scheduled]) -> Taps | None:
        """Taps for all sites any drafter of this step asks for."""
        sites = {site for scheduled in plan for site in scheduled.request.drafter.taps}
        return Taps(sites) if sites else None

    def _read(self, request: Request, span: Span, taps: Taps | None) -> list[Progress]:
        """Keep the rows of a piece of a prompt and show them to the drafter, for each choice that will fork them."""
        start, count = request.read, span.stop - span.start
        request.sequence.commit(count)
        request.read += count
        request.statistics.prompt_rows += count
        fresh, stop = max(start, request.shown), min(request.read, request.prompt_length)
        if fresh < stop:
            request.shown = stop
            first = span.start - start
            hidden = _rows_of(taps, request.drafter, first + fresh, first + stop)
            for each in (request, *self.scheduler.followers(request)):
                each.drafter.observe_prompt(each, fresh, hidden)
        return []

    def _fork(self, leader: Request) -> list[Request]:
        """Give the sibling choices that wait for this prompt its cache, by reference.

        All get their first token with it, those that still queue for a place in the batch, too.
        """
        followers = self.scheduler.followers(leader)
        for follower in followers:
            follower.sequence, follower.leader = leader.sequence.fork(), None
            follower.read, follower.shown = leader.read, leader.shown
        return followers

    def _bequeath(self, leader: Request) -> None:
        """Let the first sibling that waits for an aborted choice go on reading their prompt in its place."""
        followers = self.scheduler.followers(leader)
        if not followers:
            return
        heir = followers[0]
        heir.sequence, leader.sequence = leader.sequence, heir.sequence
        heir.read, heir.shown, heir.leader = leader.read, leader.shown, None
        for follower in followers[1:]:
            follower.leader = heir

    def _decode(self, request: Request, answer: Answer) -> list[Progress]:
        """What a pass gave a request goes through the stopping rules, and is kept and reported."""
        started = time.perf_counter()
        decoding, statistics, grammar = request.decoding, request.statistics, request.sampler.grammar
        emitted = decoding.receive(request, answer)
        kept = request.stopper.accept(emitted, None if grammar is None else grammar.length(emitted))
        tokens = emitted[:kept]
        kinds = decoding.keep(request, tokens)
        request.tokens += tokens
        request.kinds += kinds
        statistics.tokens += len(tokens)
        statistics.verify_seconds += time.perf_counter() - started
        request.finish_reason = request.stopper.reason
        if request.finish_reason is None and decoding.exhausted:
            request.finish_reason = "length"
        if not tokens and request.finish_reason is None:
            return []
        if tokens and request.first_token_at is None:
            request.first_token_at = time.perf_counter()
        progress = self._progress(request, tokens, kinds)
        if request.finish_reason is None:
            decoding.observe(request, tokens)
        else:
            self._finish(request)
        return [progress]

    def _finish(self, request: Request) -> None:
        """Release everything a request holds; only then it is over, for those who wait for it."""
        self.scheduler.remove(request)
        try:
            request.decoding.close()
            request.drafter.end(request)
        finally:
            self._give_back(request)
            request.finished_at = time.perf_counter()

    def _give_back(self, request: Request) -> None:
        """Release a request's slots, or keep them for prompts that begin as its text."""
        # What was evicted, or never was a token, is no text to begin behind.
        whole = request.sequence.length == request.read and not request.spans
        if self.prefixes.limit_bytes and whole and isinstance(request.decoding, Speculation):
            # The last draft may have been accepted beyond where the text was ended.
            request.sequence.crop(min(request.read, len(request.tokens)))
            self.prefixes.keep(request.params.tenant, request.tokens[: request.read], request.sequence)
        else:
            request.sequence.release()


def _rows_of(taps: Taps | None, drafter: Drafter, start: int, stop: int) -> Taps | None:
    """The rows `start:stop` of the sites one drafter asked for."""
    if taps is None or not drafter.taps:
        return None
    own = Taps(drafter.taps)
    own.states = {site: taps.states[site][start:stop] for site in drafter.taps}
    return own
