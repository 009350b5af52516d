"""What a request needs before it can be added, made beside the steps of others: drafters, policies, grammars."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import getrandbits
from threading import Lock

from hasten.engine import creation
from hasten.engine.canvas.denoiser import Denoiser
from hasten.engine.context import EVERYTHING, ContextPolicy
from hasten.engine.drafting.drafter import Drafter
from hasten.engine.prompt import EmbeddedSpan, Segment, laid_out
from hasten.engine.registry import Target
from hasten.engine.sampling.bans import Word, spelled
from hasten.engine.sampling.grammar import Grammars, GrammarState
from hasten.engine.sampling.params import SamplingParams
from hasten.errors import UserError

DRAFTERS = 16
"""Specifications whose drafters an engine keeps though no request uses them."""
POLICIES = 64
"""Specifications whose context policies an engine keeps; requests hold on to theirs."""


@dataclass(frozen=True)
class Prepared:
    """A prompt that is ready to be added.

    Attributes:
        tokens, spans: as `hasten.engine.prompt.laid_out` gives them, of what the policy has left of the prompt.
        params: with a seed.
        method: the drafter's specification, for reports.
        drafter, context: shared by all requests of these specifications.
        grammars: a constraint's state for each choice; None without a constraint.
        words: spellings of the request's bad words.
        room: tokens that may follow in the model's context.
    """

    tokens: list[int]
    spans: tuple[EmbeddedSpan, ...]
    params: SamplingParams
    method: str
    drafter: Drafter
    context: ContextPolicy
    grammars: list[GrammarState | None]
    words: frozenset[Word]
    room: int


class Preparation:
    """Makes and keeps what requests share. Any thread may come; who asks for what another one is making waits for that.

    Args:
        target: the model and what belongs to it.
        used: specifications whose drafters are in use now.
    """

    def __init__(self, target: Target, used: Callable[[], Collection[str]]) -> None:
        self._target, self._used = target, used
        self._lock = Lock()
        self._making: dict[Hashable, Lock] = {}
        self._drafters: dict[str, Drafter] = {}
        self._policies: dict[str, ContextPolicy] = {}
        self._grammars: Grammars | None = None

    def prepare(
        self,
        prompt: Sequence[Segment],
        params: SamplingParams,
        method: str | Drafter = "plain",
        context: str | ContextPolicy = EVERYTHING,
    ) -> Prepared:
        """All that is slow about a request, done.

        Raises:
            UserError: see `hasten.engine.Engine.add`.
        """
        target, config = self._target, self._target.model.config
        policy = self.context(context)
        tokens, spans = laid_out(policy.reduce(prompt), config.vocab_size, config.hidden_size, target.model.device)
        room = config.max_positions - len(tokens)
        if room <= 0:
            raise UserError(
                f"the prompt has {len(tokens)} tokens, which leaves no room in the context of {config.max_positions}"
            )
        if params.stop and target.tokenizer is None:
            raise UserError("stop strings need a tokenizer, and this model has none")
        outside = next((token for token in params.stop_token_ids if token >= config.vocab_size), None)
        if outside is not None:
            raise UserError(f"stop_token_ids: token id {outside} is outside the vocabulary of {config.vocab_size}")
        words = spelled(target.tokenizer, params.bad_words, config.vocab_size)
        if params.seed is None:
            params = replace(params, seed=getrandbits(63))
        name, drafter = self.drafter(method)
        if isinstance(drafter, Denoiser) and policy is not EVERYTHING:
            raise UserError(f"{name} fills a canvas, all of which must be kept: it cannot have a context policy")
        with self._one_at_a_time(id(drafter)):
            drafter.prepare()
        grammars = [self._grammar(params) for _ in range(params.n)]
        return Prepared(tokens, spans, params, name, drafter, policy, grammars, words, room)

    def drafter(self, method: str | Drafter) -> tuple[str, Drafter]:
        """The shared drafter of a specification, or a drafter object as it is; and its name.

        It is made once, and kept with what it learns as long as it is among the `DRAFTERS` used last, or in use.

        Raises:
            UserError: unknown, or not for this model.
        """
        if isinstance(method, Drafter):
            name, drafter = type(method).__name__, method
        else:
            with self._one_at_a_time(("drafter", method)):
                with self._lock:
                    known = self._drafters.get(method)
                name, drafter = method, creation.create(method, self._target) if known is None else known
                self._remember(method, drafter)
        config = self._target.model.config
        if isinstance(drafter, Denoiser) and config.diffusion is None:
            raise UserError(f"{name} needs a model that fills masked positions; this one predicts the next token")
        if not isinstance(drafter, Denoiser) and config.fills_canvas:
            raise UserError(f"{name} needs a model that predicts the next token; this one fills masked positions")
        return name, drafter

    def context(self, policy: str | ContextPolicy) -> ContextPolicy:
        """The shared context policy of a specification, or a policy object as it is.

        Raises:
            UserError: unknown, or not for this model.
        """
        if isinstance(policy, ContextPolicy):
            return policy
        with self._one_at_a_time(("context", policy)):
            known = self._policies.get(policy) or creation.create_context(policy, self._target)
            self._policies[policy] = known
            for old in list(self._policies)[:-POLICIES]:
                self._policies.pop(old, None)
            return known

    def _grammar(self, params: SamplingParams) -> GrammarState | None:
        """A constraint's state at the start of a request."""
        if params.constraint is None:
            return None
        with self._one_at_a_time(Grammars):
            if self._grammars is None:
                target = self._target
                self._grammars = Grammars(target.tokenizer, target.model.config.vocab_size, target.end_ids)
        return self._grammars.start(params.constraint)

    def _remember(self, method: str, drafter: Drafter) -> None:
        """As the one used last; where there are too many, those that were not used for longest go."""
        with self._lock:
            self._drafters.pop(method, None)
            self._drafters[method] = drafter
            used = {method, *self._used()}
            idle = [spec for spec in self._drafters if spec not in used]
            for spec in idle[: max(0, len(self._drafters) - DRAFTERS)]:
                del self._drafters[spec]

    @contextmanager
    def _one_at_a_time(self, what: Hashable) -> Iterator[None]:
        """Threads that make the same do so one after the other."""
        with self._lock:
            lock = self._making.setdefault(what, Lock())
        try:
            with lock:
                yield
        finally:
            with self._lock:
                self._making.pop(what, None)
