"""What a user asks of one completion."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Literal

from hasten.engine.sampling.grammar import Constraint
from hasten.engine.sampling.values import shown, take
from hasten.errors import require, require_finite

Acceptance = Literal["match", "max", "typical"]
"""`match`: keyed noise, the same text as plain decoding. `max`: the classic rules (Leviathan/Chen, SpecInfer, without
replacement) for sampled drafts: the same distribution, other text, accepted more often. `typical`: Medusa's, lossy."""

LEAST = 1e-6
"""Of what divides logits: what is smaller makes them infinite."""
LEAST_TEMPERATURE = 1e-30
"""What is smaller counts as it, and chooses the same tokens; float32 has no number for some of it."""
LARGEST_BIAS = 1e38
"""Finite in float32, and with a logit added, too."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling, stopping and reporting of one request. None for any of them is its default.

    Attributes:
        max_tokens: at most this many new tokens; None means up to the context limit.
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose mass reaches top_p.
        min_p: keep tokens at least min_p times as likely as the likeliest.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output (CTRL).
        presence_penalty, frequency_penalty: subtracted from logits of output tokens, once or per occurrence (OpenAI).
        logit_bias: token id to a number added to its logit; -infinity bans the token.
        seed: fixes the text for every lossless method, batch and machine; None draws one.
        n: independent choices per prompt; they share the prompt's cache.
        stop: strings that end the text (and are not part of it). One that is a special token matches that token.
        stop_token_ids: tokens that end the text as end-of-text does (also with `ignore_eos`).
        min_tokens: so many tokens come before any of these may end the text; the end of a constraint does not wait.
        bad_words: texts, or token ids, that the output does not say: of each, the last token is impossible behind the
            others. A text is spelled as the tokenizer spells it, at the beginning and behind a blank.
        ignore_eos: go on after end-of-text.
        skip_special_tokens: leave special tokens out of the text.
        logprobs: report this many likeliest tokens per position, with the chosen one; None reports nothing.
            Log-probabilities are the model's own, before temperature, penalties and filters.
        prompt_logprobs: the same of the prompt's tokens, each as what is before it predicts it.
        constraint: what the output must be (a JSON schema, a regular expression, a grammar). The output ends as soon as
            nothing more may follow, with finish reason `stop`.
        acceptance: see `Acceptance`; it matters only when sampling.
        typical_epsilon, typical_delta: of the typical rule, p(x) > min(epsilon, delta * exp(-entropy)).
        tenant: requests of different tenants never share what a drafter has learned from text. It changes speed only,
            but speed can tell one user what another one wrote.

    Raises:
        UserError: a value of another kind (`values.take`), or out of range; NaN, and infinity other than in logit_bias,
            are out of every range.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    acceptance: Acceptance = "match"
    typical_epsilon: float = 0.09
    typical_delta: float = 0.3
    tenant: str = ""

    def __post_init__(self) -> None:
        take(self)
        if 0 < self.temperature < LEAST_TEMPERATURE:
            object.__setattr__(self, "temperature", LEAST_TEMPERATURE)
        checks = (
            (
                self.constraint is None or isinstance(self.constraint, Constraint),
                f"constraint must be a Constraint, not {shown(self.constraint)}",
            ),
            (self.max_tokens is None or self.max_tokens >= 1, "max_tokens must be at least 1"),
            (0 <= self.temperature <= 100, "temperature must be between 0 and 100"),
            (self.top_k >= 0, "top_k must be 0 (off) or positive"),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (0 <= self.min_p <= 1, "min_p must be between 0 and 1"),
            (LEAST <= self.repetition_penalty <= 1 / LEAST, "repetition_penalty must be between 1e-6 and 1e6"),
            (-2 <= self.presence_penalty <= 2, "presence_penalty must be between -2 and 2"),
            (-2 <= self.frequency_penalty <= 2, "frequency_penalty must be between -2 and 2"),
            (
                all(value == -inf or abs(value) <= LARGEST_BIAS for value in self.logit_bias.values()),
                "logit_bias must be finite numbers in float32, or -infinity, which bans a token",
            ),
            (self.n >= 1, "n must be at least 1"),
            (all(self.stop), "stop strings must not be empty"),
            (all(map(_is_id, self.stop_token_ids)), "stop_token_ids must be token ids"),
            (_is_id(self.min_tokens), "min_tokens must be a whole number of at least 0"),
            (
                self.max_tokens is None or self.min_tokens <= self.max_tokens,
                f"min_tokens ({self.min_tokens}) must not be more than max_tokens ({self.max_tokens})",
            ),
            (
                all(word if isinstance(word, str) else word and all(map(_is_id, word)) for word in self.bad_words),
                "bad_words must be texts, or lists of token ids, that are not empty",
            ),
            (self.logprobs is None or 0 <= self.logprobs <= 100, "logprobs must be between 0 and 100"),
            (
                self.prompt_logprobs is None or (_is_id(self.prompt_logprobs) and self.prompt_logprobs <= 100),
                "prompt_logprobs must be a whole number between 0 and 100",
            ),
            (self.acceptance in ("match", "max", "typical"), "acceptance must be match, max or typical"),
            (
                self.constraint is None or not self.ignore_eos,
                "ignore_eos and a constraint exclude each other: the constraint says where the text may end",
            ),
            (
                self.typical_epsilon > 0 and self.typical_delta > 0,
                "typical_epsilon and typical_delta must be positive",
            ),
        )
        require(checks)
        require_finite(self)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def endings(self, end_ids: Collection[int]) -> frozenset[int]:
        """Tokens that end the text.

        Args:
            end_ids: end-of-text ids of the model.
        """
        return frozenset(self.stop_token_ids).union(() if self.ignore_eos else end_ids)

    @property
    def penalised(self) -> bool:
        """Whether the distribution depends on earlier tokens other than through the model."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _is_id(value: object) -> bool:
    """Whether a value is a whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
