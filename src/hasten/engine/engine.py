"""The one loop: schedule, propose, forward, verify, commit. Plain decoding is the empty draft on the same path."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.cache import Cache, Prefixes
from hasten.engine.beginnings import Beginnings
from hasten.engine.canvas.denoiser import Denoiser
from hasten.engine.canvas.filling import Filling
from hasten.engine.computing import Computed, approximated, compute, together
from hasten.engine.context import EVERYTHING, ContextPolicy
from hasten.engine.decoding import Answer
from hasten.engine.drafting.draft import MAX_DRAFT
from hasten.engine.drafting.drafter import Drafter
from hasten.engine.drafting.speculation import Speculation
from hasten.engine.drafting.verification import Verdict
from hasten.engine.job import Job
from hasten.engine.memory import Footprint, Ledger
from hasten.engine.packing import taps_of
from hasten.engine.placement import Placed, Placement
from hasten.engine.preparation import Preparation, Prepared
from hasten.engine.prompt import EMBEDDED, Segment
from hasten.engine.registry import Target
from hasten.engine.report import TokenKind
from hasten.engine.request import Progress
from hasten.engine.sampling.bans import Bans
from hasten.engine.sampling.params import SamplingParams
from hasten.engine.sampling.sampler import Sampler
from hasten.engine.sampling.walk import Walk, descend
from hasten.engine.scheduler import Limits, Scheduler
from hasten.engine.stopping import FinishReason, Stopper
from hasten.engine.turn import Turn
from hasten.model import Model, Rows, Span, Taps
from hasten.model.threads import refuse_fork


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
            read again. Tenants share none; a drafter may need all of its prompts read.
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
        self.scheduler = Scheduler(limits or Limits(), lambda request: self._beginnings.find(request))
        self.cache = Cache(model.config.layers, model.cache_dtype, model.device, cache_bytes)
        self.prefixes = Prefixes(prefix_bytes)
        self.target = Target(model, tokenizer, folder, self.end_ids)
        self.ledger = Ledger()
        self._preparation = Preparation(self.target, self._methods_in_use)
        self._placement = Placement(self.scheduler, self.cache, self.prefixes)
        self._beginnings = Beginnings(self.cache, self.prefixes, self.scheduler)
        self._next_id = 0
        self._turn = Turn()

    # Requests

    def drafter(self, method: str | Drafter) -> tuple[str, Drafter]:
        """A specification's drafter, which all its requests share, and its name: see `Preparation.drafter`.

        Raises:
            UserError: unknown, or not for this model.
        """
        return self._preparation.drafter(method)

    def _methods_in_use(self) -> set[str]:
        # Copies, since another thread may be taking a step.
        return {request.method for request in (*list(self.scheduler.running), *list(self.scheduler.waiting))}

    def add(
        self,
        prompt: Sequence[Segment],
        params: SamplingParams,
        method: str | Drafter = "plain",
        read: bool = False,
        context: str | ContextPolicy = EVERYTHING,
    ) -> list[Job]:
        """Queue a prompt and return its choices (`params.n` requests).

        What takes long (loading a drafter, compiling a grammar, measuring) is done before, beside the steps of others.

        Args:
            prompt: token ids, and spans of embeddings; at least one.
            params: sampling, stopping, reporting.
            method: specification or drafter, for this prompt only.
            read: keep `Progress.text` up to date, and all progress in `Request.unread` (streaming).
            context: specification or policy: what the cache keeps of this prompt and its answers.

        Raises:
            UserError: an empty prompt, ids outside the vocabulary (of prompt or logit_bias), embeddings that do not
                fit, no room left in the context, unknown method, a constraint that cannot be used; a forked process.
        """
        refuse_fork()
        prepared = self._preparation.prepare(prompt, params, method, context)
        with self._turn:
            return self._add(prepared, read)

    def _add(self, prepared: Prepared, read: bool) -> list[Job]:
        config, params, drafter = self.model.config, prepared.params, prepared.drafter
        tokens = prepared.tokens
        words = [token for token in tokens if token != EMBEDDED]
        endings = params.endings(self.end_ids)
        requests: list[Job] = []
        unread: deque[Progress] | None = deque() if read else None
        for choice, grammar in enumerate(prepared.grammars):
            request = Job(
                decoding=Speculation(drafter),
                id=self._next_id,
                tokens=list(tokens),
                prompt_length=len(tokens),
                params=params,
                choice=choice,
                drafter=drafter,
                method=prepared.method,
                context=prepared.context,
                sequence=prepared.context.sequence(self.cache),
                sampler=Sampler(
                    params, choice, words, config.vocab_size, grammar, Bans(endings, params.min_tokens, prepared.words)
                ),
                stopper=Stopper(params, self.end_ids, self.tokenizer, prepared.room, read),
                spans=prepared.spans,
                leader=requests[0] if requests else None,
                unread=unread,
            )
            self._next_id += 1
            requests.append(request)
            if isinstance(drafter, Denoiser):
                request.leader, request.decoding = None, Filling(request, drafter, config, self.end_ids)
            self.scheduler.add(request)
        try:
            for request in requests:
                drafter.begin(request)
        except BaseException:
            for request in requests:
                self._end(request, "abort")
            raise
        return requests

    def abort(self, request: Job) -> None:
        """End a request, at the latest after the step that another thread is taking; harmless if it has ended."""
        self._turn.later(lambda: self._end(request, "abort"))

    def _end(self, request: Job, reason: FinishReason) -> None:
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
        late = self._placement.late
        progress += self._propose([each.request for each in plan if not each.piece and each.request not in late])
        placed, refused = self._placement.place([each for each in plan if each.request.finish_reason is None])
        if refused is not None:
            progress += self._fail(*refused)
        if not placed:
            return progress
        computed = []
        for group in together(placed):
            try:
                computed.append(compute(self.model, group))
            except Exception as error:
                if approximated(group[0]) is None:
                    raise
                for (request, _), _ in group:
                    progress += self._fail(request, error)
        for each in computed:
            progress += self._receive(each)
        return progress

    def _receive(self, computed: Computed) -> list[Progress]:
        """What a pass gave goes to those who were in it."""
        placed, rows, taps = computed.placed, computed.rows, computed.taps
        self._record(rows, computed.logits)
        stop = 0
        answers: list[Answer] = []
        for ((request, piece), passage), span in zip(placed, rows.spans, strict=True):
            request.statistics.forward_seconds += computed.seconds
            offset, stop = stop, stop + len(passage.wanted)
            hidden = taps_of(taps, request.drafter, span.stop - 1 if piece else span.start, span.stop)
            own = computed.logits[offset:stop], computed.best[offset:stop], computed.finite[offset:stop]
            answers.append(Answer(*own, hidden, len(rows.tokens)))
        progress = [each for request, error in computed.failed for each in self._fail(request, error)]
        progress += self._judge(placed, answers)
        for ((request, piece), _), span, answer in zip(placed, rows.spans, answers, strict=True):
            if request.finish_reason is not None:
                continue
            if not piece:
                progress += self._alone(request, self._decode, answer)
                continue
            progress += self._alone(request, self._read, span, taps, answer)
            self._beginnings.hand_on(request)
            if request.read == len(request.tokens) and request.finish_reason is None:
                # Of the rows that are wanted, the last one is what the prompt leads to.
                answer = answer._replace(logits=answer.logits[-1:], best=answer.best[-1:], finite=answer.finite[-1:])
                for choice in (request, *self._fork(request)):
                    progress += self._alone(choice, self._decode, answer)
        return progress

    def _judge(self, placed: Sequence[Placed], answers: list[Answer]) -> list[Progress]:
        """Enter verdicts on drafts into the answers, all in one call; what became of requests where that failed."""
        walks: dict[int, Walk] = {}
        failed: list[Progress] = []

        def ask(request: Job, number: int) -> list[Progress]:
            assert isinstance(request.decoding, Speculation)
            walk = request.decoding.walk(request, answers[number])
            if walk is not None:
                walks[number] = walk
            return []

        started = time.perf_counter()
        for number, ((request, piece), _) in enumerate(placed):
            if not piece and request.finish_reason is None and isinstance(request.decoding, Speculation):
                failed += self._alone(request, ask, number)
        for number, outcome in zip(walks, descend(list(walks.values())), strict=True):
            answers[number] = answers[number]._replace(verdict=Verdict(*outcome))
        seconds = (time.perf_counter() - started) / max(1, len(walks))
        for number in walks:
            placed[number][0].request.statistics.verify_seconds += seconds
        return failed

    def _alone(self, request: Job, work: Callable[..., list[Progress]], *arguments: Any) -> list[Progress]:
        """Do a request's part of a step; what goes wrong there ends that request only."""
        try:
            return work(request, *arguments)
        except Exception as error:
            return self._fail(request, error)
        except BaseException:
            # Half of the step has been taken.
            self._end(request, "abort")
            raise

    def _fail(self, request: Job, error: Exception) -> list[Progress]:
        """End a request that cannot go on."""
        request.error = error
        self._end(request, "error")
        return [self._progress(request, [], [])]

    def _progress(self, request: Job, tokens: list[int], kinds: list[TokenKind]) -> Progress:
        """Report what a step gave, to the stepping thread and to who reads along."""
        progress = Progress(request, tokens, kinds, request.stopper.fresh(), request.finish_reason)
        if request.unread is not None:
            request.unread.append(progress)
        return progress

    def _record(self, rows: Rows, logits: Tensor) -> None:
        """Enter the step into the ledger."""
        masks = sum(span.mask.nbytes for span in rows.spans if isinstance(span.mask, Tensor))
        self.ledger.record(Footprint(self.cache.used_bytes, logits.nbytes, masks))

    def _hold_back(self) -> list[Progress]:
        """Let those that run wait whose drafters do not let them go on; what became of them where that failed."""
        failed: list[Progress] = []
        # The last first: each comes to the head of the queue.
        for request in [each for each in reversed(self.scheduler.running) if each.drafter.rations]:
            failed += self._alone(request, self._ask)
        return failed

    def _ask(self, request: Job) -> list[Progress]:
        if not request.drafter.admits(request):
            self._placement.preempt(request)
        return []

    def _propose(self, requests: Sequence[Job]) -> list[Progress]:
        """Have drafts made, and canvases' first passages; what became of the requests where that failed."""
        groups: dict[int, list[Job]] = {}
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

    def _look(self, request: Job) -> list[Progress]:
        request.decoding.passage(request, 0)
        return []

    def _draft(self, *requests: Job) -> list[Progress]:
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

    def _read(self, request: Job, span: Span, taps: Taps | None, answer: Answer) -> list[Progress]:
        """Keep the rows of a piece of a prompt and show them to the drafter, for each choice that will fork them."""
        start, count = request.read, span.stop - span.start
        assert isinstance(request.decoding, Speculation)
        request.decoding.report_prompt(request, start, answer)
        request.sequence.commit(count)
        request.read += count
        request.statistics.prompt_rows += count
        request.context.committed(request)
        fresh, stop = max(start, request.shown), min(request.read, request.prompt_length)
        if fresh < stop:
            request.shown = stop
            first = span.start - start
            hidden = taps_of(taps, request.drafter, first + fresh, first + stop)
            for each in (request, *self.scheduler.followers(request)):
                each.drafter.observe_prompt(each, fresh, hidden)
        return []

    def _fork(self, leader: Job) -> list[Job]:
        """Give the sibling choices that wait for this prompt its cache, by reference.

        All get their first token with it, those that still queue for a place in the batch, too.
        """
        followers = self.scheduler.followers(leader)
        for follower in followers:
            follower.sequence, follower.leader = leader.sequence.fork(), None
            follower.read, follower.shown = leader.read, leader.shown
            follower.prompt_logprobs = leader.prompt_logprobs
        return followers

    def _bequeath(self, leader: Job) -> None:
        """Let the first sibling that waits for an aborted choice go on reading their prompt in its place."""
        followers = self.scheduler.followers(leader)
        if not followers:
            return
        heir = followers[0]
        heir.sequence, leader.sequence = leader.sequence, heir.sequence
        heir.read, leader.read, heir.shown, heir.leader = leader.read, heir.read, leader.shown, None
        heir.prompt_logprobs = leader.prompt_logprobs
        heir.forerunner, heir.common = leader.forerunner, leader.common
        self._beginnings.enter(heir)
        for follower in followers[1:]:
            follower.leader = heir

    def _decode(self, request: Job, answer: Answer) -> list[Progress]:
        """What a pass gave a request goes through the stopping rules, and is kept and reported."""
        started = time.perf_counter()
        decoding, statistics, grammar = request.decoding, request.statistics, request.sampler.grammar
        emitted = decoding.receive(request, answer)
        last = None if grammar is None else grammar.length(emitted)
        complete = grammar is None or last is None or grammar.completes(emitted[:last])
        kept = request.stopper.accept(emitted, last, complete)
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
            request.context.committed(request)
            decoding.observe(request, tokens)
        else:
            self._finish(request)
        return [progress]

    def _finish(self, request: Job) -> None:
        """Release everything a request holds; only then it is over, for those who wait for it."""
        self.scheduler.remove(request)
        try:
            request.decoding.close()
            request.drafter.end(request)
        finally:
            self._beginnings.give_back(request)
            request.finished_at = time.perf_counter()
