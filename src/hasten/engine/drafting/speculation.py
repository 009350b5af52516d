"""Speculation: a draft, the target's look at all of it in one pass, and what of it the target agrees with.

Plain decoding is the empty draft on the same path.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.engine.decoding import Answer
from hasten.engine.drafting import verification
from hasten.engine.drafting.approximation import Approximation
from hasten.engine.drafting.draft import ROOT, Draft
from hasten.engine.drafting.drafter import Drafter, Observation
from hasten.engine.drafting.verification import Verdict
from hasten.engine.passage import Passage
from hasten.engine.prompt import EMBEDDED, embedded_in
from hasten.engine.report import TokenKind, TokenLogprobs
from hasten.engine.request import Request
from hasten.engine.sampling.sampler import Sampler
from hasten.engine.sampling.walk import Walk, descend
from hasten.errors import UserError
from hasten.model.decoder import NOT_FINITE
from hasten.model.threads import on_one_thread

NOTHING = torch.empty(0, 0)


class Speculation:
    """Reads the prompt in pieces, then verifies a draft per step.

    Args:
        drafter: is shown what is verified.

    Attributes:
        draft: what the next pass verifies; the engine has it proposed.
    """

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.draft = Draft()
        self._verdict = Verdict([], -1)
        self._answer: Answer | None = None

    @property
    def exhausted(self) -> bool:
        return False

    @property
    def drafted(self) -> int:
        return self.draft.rows

    def backlog(self, request: Request) -> int:
        # The root is read with its draft. After a preemption the rest of the output is read as the prompt is; an
        # approximation's rows come one by one.
        left = len(request.tokens) - request.read - (1 if request.started else 0)
        if isinstance(self._drafter, Approximation):
            return min(left, max(request.prompt_length - request.read, 1))
        return left

    def slots(self, request: Request) -> int:
        """Of what is known, without the draft."""
        return len(request.tokens) - request.read

    def passage(self, request: Request, piece: int) -> Passage:
        """A piece of the prompt, whose last row is wanted if it is the prompt's, too; or the root and its draft.

        Where the prompt's log-probabilities are asked for, all rows of the piece are.
        """
        read = request.read
        if piece:
            stop = read + piece
            first = piece - 1 if stop == len(request.tokens) else piece
            wanted = range(0 if request.params.prompt_logprobs is not None else first, piece)
            embedded = tuple(embedded_in(request.spans, read, stop))
            return Passage(request.tokens[read:stop], range(read, stop), wanted, embedded=embedded)
        draft = self.draft
        if not draft and not draft.probes:
            return Passage(request.tokens[read : read + 1], (read,), (0,))
        probes, offsets = draft.probed()
        tokens = [request.tokens[read], *draft.tokens, *probes]
        positions = [read + offset for offset in (0, *draft.depths(), *offsets)]
        soft, joins = draft.embedded(), draft.joins()
        return Passage(tokens, positions, draft.heard(), draft.mask(), embedded=soft, joins=joins)

    def walk(self, request: Request, answer: Answer) -> Walk | None:
        """What is to be chosen, one row after the other, where a verdict takes just that; None where it does not.

        Without sampled nodes, `max` and `match` accept as often: then the text need not depend on the draft.
        """
        sampler, params = request.sampler, request.params
        matched = params.greedy or params.acceptance == "match" or (params.acceptance == "max" and not self.draft.drawn)
        if sampler.is_argmax or not matched or self.draft.transfer or self.draft.trusted or not answer.finite[0]:
            return None
        return sampler.walk(answer.logits, len(request.tokens), self.draft)

    def report_prompt(self, request: Request, start: int, answer: Answer) -> None:
        """Log-probabilities of the prompt's tokens, as a piece of it predicts them; those that are known stay.

        Args:
            start: position of the piece's first row.
            answer: to all of its rows.

        Raises:
            UserError: logits that are not finite.
        """
        top, known = request.params.prompt_logprobs, request.prompt_logprobs
        if top is None:
            return
        if not known:
            known.append(None)
        stop = min(start + len(answer.best) + 1, request.prompt_length)
        tokens, rows = request.tokens[len(known) : stop], range(len(known) - 1 - start, stop - 1 - start)
        if not all(answer.finite[row] for row in rows):
            raise UserError(NOT_FINITE)
        words = [(token, row) for token, row in zip(tokens, rows, strict=True) if token != EMBEDDED]
        if not words:
            known += [None] * len(tokens)
            return
        reported = iter(_logprobs(answer.logits, [row for _, row in words], [token for token, _ in words], top))
        known += [None if token == EMBEDDED else next(reported) for token in tokens]

    def receive(self, request: Request, answer: Answer) -> list[int]:
        """The accepted path and the target's own token.

        Raises:
            UserError: logits on the way that are not finite. Those of drafted rows that are rejected do not matter:
                plain decoding would never see them.
        """
        if not answer.finite[0]:
            raise UserError(NOT_FINITE)
        self._answer, self._verdict = answer, answer.verdict or self._verify(request, answer)
        path, token = self._verdict.path, self._verdict.token
        if not all(answer.finite[node + 1] for node in path):
            raise UserError(NOT_FINITE)
        return [*(self.draft.tokens[node] for node in path), token]

    def keep(self, request: Request, tokens: Sequence[int]) -> list[TokenKind]:
        """Commits the accepted rows to the cache.

        Raises:
            UserError: none of the tokens that were to choose from was possible.
        """
        answer, draft, path, statistics = self._answer, self.draft, self._verdict.path, request.statistics
        assert answer is not None
        if not request.sampler.is_argmax:
            _require_possible(request.sampler, tokens)
        rows = [0, *(node + 1 for node in path)]
        if request.started:
            request.sequence.commit(rows)
            request.read += len(rows)
        if request.params.logprobs is not None:
            with on_one_thread():
                request.logprobs += _logprobs(answer.logits, rows, tokens, request.params.logprobs)
        request.sampler.committed(tokens)
        accepted = min(len(tokens), len(path))
        statistics.steps += 1
        statistics.rows += 1 + draft.rows
        statistics.proposed += len(draft)
        statistics.accepted += accepted
        statistics.accepted_per_step.append(accepted)
        kinds: list[TokenKind] = ["accepted"] * accepted
        if len(tokens) > accepted:
            kinds.append("correction" if draft else "plain")
        return kinds

    def observe(self, request: Request, tokens: Sequence[int]) -> None:
        """Shows the drafter all verified rows, rejected ones included."""
        answer, count = self._answer, len(self.draft) + 1
        assert answer is not None
        started = time.perf_counter()
        taps = {} if answer.taps is None else answer.taps.states
        states = {key: rows[:count] for key, rows in taps.items()}
        shown, probes = answer.logits, NOTHING
        if self.draft.probes:
            shown, probes = answer.logits[:count], answer.logits[count:]
        behind = {key: rows[count:] for key, rows in taps.items()}
        path = self._verdict.path
        seen = Observation(self.draft, path, list(tokens), shown, states, probes, behind, answer.rows)
        self._drafter.observe(request, seen)
        request.statistics.draft_seconds += time.perf_counter() - started
        self.draft, self._answer = Draft(), None

    def close(self) -> None:
        """Nothing: what it holds goes with the request."""

    def _verify(self, request: Request, answer: Answer) -> Verdict:
        """The acceptance rule that the request's parameters ask for."""
        sampler, params, draft = request.sampler, request.params, self.draft
        if draft.trusted:
            row, position = answer.logits[len(draft) : len(draft) + 1], len(request.tokens) + len(draft)
            return verification.trust(draft, lambda path: sampler.choose(row, [position], [path])[0])
        if sampler.is_argmax and not draft.transfer:
            return verification.match(draft, answer.best)
        walk = self.walk(request, answer)
        if walk is not None:
            return Verdict(*descend([walk])[0])
        logits = answer.logits[: len(draft) + 1] if draft.probes else answer.logits
        paths = [[draft.tokens[node] for node in draft.path(node)] for node in (ROOT, *range(len(draft)))]

        def target(node: int) -> Tensor:
            row = slice(node + 1, node + 2)
            if params.greedy:
                return sampler.adjusted(logits[row], paths[row])[0].double().softmax(-1).cpu()
            return sampler.distribution(logits[row], paths[row]).dense(0)

        coins = sampler.coins(len(request.tokens))
        with on_one_thread():
            if draft.transfer:
                return verification.transfer(draft, target, coins, params.greedy)
            if params.acceptance == "max":
                return verification.reject(draft, target, coins)
            return verification.typical(draft, target, coins, params)


def _require_possible(sampler: Sampler, tokens: Sequence[int]) -> None:
    """Refuse a token that was chosen where every one is impossible.

    Raises:
        UserError: there is one among these.
    """
    for count, token in enumerate(tokens):
        if sampler.forbids(tokens[:count], token):
            raise UserError(
                "no token is possible: logit_bias, bad_words, min_tokens and the constraint forbid them all"
            )


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
