"""The one loop: schedule, propose, forward, verify, commit. Plain decoding is the empty draft on the same path."""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hasten.cache import Cache
from hasten.engine import registry, verification
from hasten.engine.canvas import Canvas
from hasten.engine.denoiser import Denoiser, Filling
from hasten.engine.draft import MAX_DRAFT, ROOT, Draft
from hasten.engine.drafter import Drafter, Observation
from hasten.engine.grammar import Grammars, GrammarState
from hasten.engine.memory import Footprint, Ledger
from hasten.engine.params import SamplingParams
from hasten.engine.passage import Passage
from hasten.engine.request import Request, TokenKind, TokenLogprobs
from hasten.engine.sampling import Sampler, likeliest
from hasten.engine.scheduler import Limits, Scheduled, Scheduler
from hasten.engine.stopping import FinishReason, Stopper
from hasten.engine.verification import Verdict
from hasten.errors import UserError
from hasten.model import Model, Rows, Span, Taps

DRAFTERS = 16
"""Specifications whose drafters an engine keeps though no request uses them."""


@dataclass(frozen=True)
class Progress:
    """What one step gave one request; `finish_reason` as of that step."""

    request: Request
    tokens: list[int]
    kinds: list[TokenKind]
    text: str
    finish_reason: FinishReason | None


class Engine:
    """Decodes requests of unequal length and method together.

    Args:
        model: a decoder or an oracle.
        tokenizer: for stop strings and text; may be None.
        end_ids: end-of-text token ids.
        limits: of batch and step.
        folder: the checkpoint's, for methods that want to know.
        cache_bytes: limit of the KV cache.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Any = None,
        end_ids: Collection[int] = (),
        limits: Limits | None = None,
        folder: str | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.end_ids = model, tokenizer, frozenset(end_ids)
        self.scheduler = Scheduler(limits or Limits())
        self.cache = Cache(model.config.layers, model.cache_dtype, model.device, cache_bytes)
        self.target = registry.Target(model, tokenizer, folder, self.end_ids)
        self.ledger = Ledger()
        self._drafters: dict[str, Drafter] = {}
        self._grammars: Grammars | None = None
        self._next_id = 0

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
        prompt: Sequence[int],
        params: SamplingParams,
        method: str | Drafter = "plain",
        read: bool = False,
    ) -> list[Request]:
        """Queue a prompt and return its choices (`params.n` requests).

        Args:
            prompt: token ids, at least one.
            params: sampling, stopping, reporting.
            method: specification or drafter, for this prompt only.
            read: keep `Progress.text` up to date (streaming).

        Raises:
            UserError: an empty prompt, ids outside the vocabulary (of prompt or logit_bias), no room left in the
                context, unknown method, a constraint that cannot be used.
        """
        config = self.model.config
        room = config.max_positions - len(prompt)
        if not prompt:
            raise UserError("the prompt is empty: give at least one token")
        if room <= 0:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, which leaves no room in the context of {config.max_positions}"
            )
        outside = next((token for token in prompt if not 0 <= token < config.vocab_size), None)
        if outside is not None:
            raise UserError(f"token id {outside} is outside the vocabulary of {config.vocab_size}")
        if params.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer, and this model has none")
        if params.seed is None:
            params = replace(params, seed=random.getrandbits(63))
        name, drafter = self.drafter(method)
        requests: list[Request] = []
        for choice in range(params.n):
            stopper = Stopper(params, self.end_ids, self.tokenizer, room, read)
            sequence = self.cache.sequence()
            request = Request(
                id=self._next_id,
                tokens=list(prompt),
                prompt_length=len(prompt),
                params=params,
                choice=choice,
                drafter=drafter,
                method=name,
                sequence=sequence,
                sampler=Sampler(params, choice, prompt, config.vocab_size, self._grammar(params)),
                stopper=stopper,
                leader=requests[0] if requests else None,
            )
            self._next_id += 1
            requests.append(request)
            if isinstance(drafter, Denoiser):
                request.leader, request.filling = None, self._filling(request, drafter)
            self.scheduler.add(request)
        try:
            for request in requests:
                drafter.begin(request)
        except BaseException:
            for request in requests:
                self.abort(request)
            raise
        return requests

    def _filling(self, request: Request, denoiser: Denoiser) -> Filling:
        """A fresh canvas for a request.

        Raises:
            UserError: parameters that a canvas cannot serve.
        """
        config, params = self.model.config, request.params
        assert config.diffusion is not None
        if params.constraint is not None or params.logprobs is not None:
            what = "a constraint" if params.constraint is not None else "logprobs"
            raise UserError(f"{what} cannot be had from a model that fills masked positions in any order")
        length = denoiser.canvas_length(request, config)
        ends = () if params.ignore_eos else self.end_ids
        canvas = Canvas(request.tokens, length, config.diffusion.mask_id, request.sampler, ends)
        return Filling(canvas, denoiser.decode(request, canvas))

    def abort(self, request: Request) -> None:
        """End a request now; harmless if it has ended."""
        if request.finish_reason is None:
            request.finish_reason = "abort"
            self._bequeath(request)
            self._finish(request)

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return len(self.scheduler) > 0

    def run(self) -> Iterator[Progress]:
        """Steps until nothing is left to do."""
        while self.busy:
            yield from self.step()

    # One step

    @torch.inference_mode()
    def step(self) -> list[Progress]:
        """One pass of the loop over everything that is scheduled.

        Raises:
            UserError: the KV cache is full. No request has changed: the step may be tried again when there is room.
        """
        plan = self.scheduler.plan()
        if not plan:
            return []
        drafts = self._propose(plan)
        started = time.perf_counter()
        passages = [self._passage(scheduled, draft) for scheduled, draft in zip(plan, drafts, strict=True)]
        rows, wanted = self._pack(plan, passages)
        taps = self._taps(plan)
        logits = self.model.forward(rows, wanted, taps)
        if self.model.config.diffusion is not None:
            # The mask is not a word: a text that says it would never be finished.
            logits[:, self.model.config.diffusion.mask_id] = -torch.inf
        chain = any(s.request.filling is None and s.decodes and s.request.sampler.is_argmax for s in plan)
        best = likeliest(logits) if chain else None
        forward_seconds = time.perf_counter() - started
        self._record(plan, rows, logits)

        progress, stop = [], 0
        for scheduled, passage, span, draft in zip(plan, passages, rows.spans, drafts, strict=True):
            request = scheduled.request
            request.statistics.forward_seconds += forward_seconds
            offset, stop = stop, stop + len(passage.wanted)
            if request.filling is not None:
                progress += self._fill(request, request.filling, passage, logits[offset:stop])
                continue
            if not scheduled.decodes:
                self._commit_prompt(scheduled, span, taps)
                continue
            own = None if best is None else best[offset:stop]
            choices, hidden, start = [request], taps, span.start
            if not request.started:
                self._commit_prompt(scheduled, span, taps)
                choices, hidden, start = [request, *self._fork_prompt(request)], None, 0
            shown = (draft, logits[offset:stop], own, hidden, start, len(rows.tokens))
            progress += [self._decode(each, *shown) for each in choices]
        return progress

    def _record(self, plan: Sequence[Scheduled], rows: Rows, logits: Tensor) -> None:
        """Enter the step into the ledger."""
        masks = sum(span.mask.nbytes for span in rows.spans if isinstance(span.mask, Tensor))
        self.ledger.record(Footprint(self.cache.used_bytes, logits.nbytes, masks))

    def _propose(self, plan: Sequence[Scheduled]) -> list[Draft]:
        """A clamped draft per scheduled request; none while a prompt is being read."""
        drafts = [Draft() for _ in plan]
        groups: dict[int, list[int]] = {}
        for index, scheduled in enumerate(plan):
            request = scheduled.request
            if request.started and request.stopper.left > 1:
                groups.setdefault(id(request.drafter), []).append(index)
        for indices in groups.values():
            requests = [plan[index].request for index in indices]
            started = time.perf_counter()
            # The target adds a token of its own, so a draft is never longer than what may come, less one.
            depths = [min(request.stopper.left - 1, MAX_DRAFT) for request in requests]
            proposed = requests[0].drafter.propose_all(requests, [MAX_DRAFT] * len(requests))
            seconds = (time.perf_counter() - started) / len(requests)
            for index, request, draft, depth in zip(indices, requests, proposed, depths, strict=True):
                drafts[index] = draft.clamped(MAX_DRAFT, depth, self.model.config.vocab_size)
                if request.sampler.grammar is not None:
                    drafts[index] = request.sampler.grammar.fit(drafts[index])
                request.statistics.draft_seconds += seconds
        return drafts

    def _passage(self, scheduled: Scheduled, draft: Draft) -> Passage:
        """What a request computes in this step: its next uncached tokens and its draft, or a look at its canvas."""
        request = scheduled.request
        if request.filling is not None:
            assert request.filling.passage is not None
            return request.filling.passage
        cached, count = request.sequence.length, scheduled.rows
        if cached in (0, request.prompt_length):
            # Before the prompt's first chunk; and before a forked choice's own first row.
            request.sequence.reserve(len(request.tokens) - cached + request.drafter.headroom(request))
        tokens, positions = request.tokens[cached : cached + count], list(range(cached, cached + count))
        if not scheduled.decodes:
            return Passage(tokens, positions, [])
        root = positions[-1]
        probes, offsets = draft.probed()
        tokens = tokens + draft.tokens + probes
        positions += [root + offset for offset in draft.depths() + offsets]
        return Passage(tokens, positions, range(count - 1, len(tokens)), draft.mask())

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
        return Rows(numbers[0], numbers[1], spans), wanted

    def _taps(self, plan: Sequence[Scheduled]) -> Taps | None:
        """Taps for all sites any drafter of this step asks for."""
        sites = {site for scheduled in plan for site in scheduled.request.drafter.taps}
        return Taps(sites) if sites else None

    def _commit_prompt(self, scheduled: Scheduled, span: Span, taps: Taps | None) -> None:
        """Keep a prompt chunk's rows and show them to the drafter, for each choice that will fork them."""
        request = scheduled.request
        start = request.sequence.length
        request.sequence.commit(scheduled.rows)
        request.statistics.prompt_rows += scheduled.rows
        hidden = _rows_of(taps, request.drafter, span.start, span.stop)
        for each in (request, *self.scheduler.followers(request)):
            each.drafter.observe_prompt(each, start, hidden)

    def _fork_prompt(self, leader: Request) -> list[Request]:
        """Give the sibling choices that wait for this prompt its cache, by reference.

        All get their first token with it, those that still queue for a place in the batch, too.
        """
        followers = self.scheduler.followers(leader)
        for follower in followers:
            follower.sequence = leader.sequence.fork()
            follower.leader = None
        return followers

    def _bequeath(self, leader: Request) -> None:
        """Let the first sibling that waits for an aborted choice go on reading their prompt in its place."""
        followers = self.scheduler.followers(leader)
        if not followers:
            return
        heir = followers[0]
        heir.sequence, leader.sequence, heir.leader = leader.sequence, heir.sequence, None
        for follower in followers[1:]:
            follower.leader = heir

    def _decode(
        self,
        request: Request,
        draft: Draft,
        logits: Tensor,
        best: list[int] | None,
        taps: Taps | None,
        row: int,
        rows: int,
    ) -> Progress:
        """Verify a draft, commit what is accepted, apply stopping, report."""
        started = time.perf_counter()
        logits, probes = logits[: len(draft) + 1], logits[len(draft) + 1 :]
        verdict = self._verify(request, draft, logits, best)
        accepted = [draft.tokens[node] for node in verdict.path]
        emitted = [*accepted, verdict.token]
        grammar = request.sampler.grammar
        kept = request.stopper.accept(emitted, None if grammar is None else grammar.length(emitted))
        tokens = emitted[:kept]
        kinds: list[TokenKind] = ["accepted"] * min(kept, len(accepted))
        if kept > len(accepted):
            kinds.append("correction" if draft else "plain")
        if request.sequence.pending:
            request.sequence.commit([0, *(node + 1 for node in verdict.path)])
        if request.params.logprobs is not None:
            request.logprobs += _logprobs(
                logits, [0, *(node + 1 for node in verdict.path)], tokens, request.params.logprobs
            )
        request.tokens += tokens
        request.kinds += kinds
        request.sampler.committed(tokens)
        statistics = request.statistics
        statistics.steps += 1
        statistics.tokens += len(tokens)
        statistics.rows += logits.shape[0] + probes.shape[0]
        statistics.proposed += len(draft)
        statistics.accepted += min(kept, len(accepted))
        statistics.accepted_per_step.append(min(kept, len(accepted)))
        statistics.verify_seconds += time.perf_counter() - started
        if request.first_token_at is None:
            request.first_token_at = time.perf_counter()
        request.finish_reason = request.stopper.reason
        if request.finish_reason is None:
            hidden = _rows_of(taps, request.drafter, row, row + len(draft) + 1)
            states = hidden.states if hidden else {}
            observation = Observation(draft, verdict.path, tokens, logits, states, probes, rows)
            observed = time.perf_counter()
            request.drafter.observe(request, observation)
            statistics.draft_seconds += time.perf_counter() - observed
        text = request.stopper.fresh()
        if request.finish_reason is not None:
            self._finish(request)
        return Progress(request, tokens, kinds, text, request.finish_reason)

    def _fill(self, request: Request, filling: Filling, passage: Passage, logits: Tensor) -> list[Progress]:
        """Hand a canvas its logits; what became final goes through the stopping rules, and is reported."""
        started = time.perf_counter()
        canvas, statistics = filling.canvas, request.statistics
        if passage.prompt:
            statistics.prompt_rows += len(passage.tokens)
        else:
            statistics.rows += len(passage.tokens)
        before, accepted = canvas.steps, statistics.accepted
        filling.receive(logits)
        if canvas.steps > before:
            statistics.steps += 1
            statistics.accepted_per_step.append(statistics.accepted - accepted)
        statistics.verify_seconds += time.perf_counter() - started
        fresh = canvas.fresh()
        tokens = fresh[: request.stopper.accept(fresh)]
        steps = canvas.committed_at[len(request.tokens) : len(request.tokens) + len(tokens)]
        alone = torch.bincount(canvas.committed_at)[steps] == 1 if tokens else steps
        request.kinds += (kinds := [_kind_of(single) for single in alone.tolist()])
        request.tokens += tokens
        statistics.tokens += len(tokens)
        request.finish_reason = request.stopper.reason
        if request.finish_reason is None and (filling.passage is None or canvas.finished):
            request.finish_reason = "length"
        if not tokens and request.finish_reason is None:
            return []
        if request.first_token_at is None and tokens:
            request.first_token_at = time.perf_counter()
        text = request.stopper.fresh()
        if request.finish_reason is not None:
            self._finish(request)
        return [Progress(request, tokens, kinds, text, request.finish_reason)]

    def _verify(self, request: Request, draft: Draft, logits: Tensor, best: list[int] | None) -> Verdict:
        """The acceptance rule that the request's parameters ask for."""
        sampler, params = request.sampler, request.params
        if best is not None and sampler.is_argmax:
            return verification.match(draft, best)
        nodes = [ROOT, *range(len(draft))]
        paths = [[draft.tokens[node] for node in draft.path(node)] for node in nodes]
        position = len(request.tokens)
        # Without sampled nodes, `max` and `match` accept as often: then the text need not depend on the draft.
        if params.greedy or params.acceptance == "match" or (params.acceptance == "max" and not draft.drawn):
            positions = [position + len(path) for path in paths]
            return verification.match(draft, sampler.choose(logits, positions, paths))

        def target(node: int) -> Tensor:
            row = node + 1
            return sampler.distribution(logits[row : row + 1], [paths[row]]).dense(0)

        coins = sampler.coins(position)
        if params.acceptance == "max":
            return verification.reject(draft, target, coins)
        return verification.typical(draft, target, coins, params)

    def _finish(self, request: Request) -> None:
        """Release everything a request holds."""
        request.finished_at = time.perf_counter()
        self.scheduler.remove(request)
        if request.filling is not None:
            request.filling.close()
        request.drafter.end(request)
        request.sequence.release()


def _kind_of(single: bool) -> TokenKind:
    """A token of a canvas came alone or with others."""
    return "plain" if single else "accepted"


def _rows_of(taps: Taps | None, drafter: Drafter, start: int, stop: int) -> Taps | None:
    """The rows `start:stop` of the sites one drafter asked for."""
    if taps is None or not drafter.taps:
        return None
    own = Taps(drafter.taps)
    own.states = {site: taps.states[site][start:stop] for site in drafter.taps}
    return own


def _logprobs(logits: Tensor, rows: Sequence[int], tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Log-probabilities of emitted tokens: token i was chosen from row `rows[i]`."""
    table = logits[torch.tensor(rows[: len(tokens)], device=logits.device)].log_softmax(-1)
    values, ids = table.topk(min(max(top, 1), table.shape[1]), -1)
    return [
        TokenLogprobs(
            token,
            float(table[i, token]),
            tuple(zip(ids[i].tolist(), values[i].tolist(), strict=True))[:top],
        )
        for i, token in enumerate(tokens)
    ]
