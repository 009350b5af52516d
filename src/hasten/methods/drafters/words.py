"""Some of the target's tokens, numbered from 0: the space that a small model with fewer words drafts in.

Softmax, filters and noise work on these words; only what is chosen is named by the target's ids. By the rejection rules
q is 0 for all other tokens, which come from the residual, so the law of the output is the target's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hasten.engine import Request
from hasten.engine.sampling.sampler import Distribution, Sampler
from hasten.errors import UserError
from hasten.methods.drafters.drawing import processed
from hasten.model.config import ModelConfig

TOKEN_MAP, VOCABULARY = "token_map", "target_vocabulary"
"""In a small model's config.json: the target's tokens that it knows, ascending, and the digest of its vocabulary."""


class Words:
    """A space of tokens, and each request's sampling in it.

    Args:
        tokens: of the target, ascending; each one's place is its number.
        device: of the logits.
        unknown: number that the small model reads for all other tokens; None where it reads the target's own ids.

    Attributes:
        tokens: int64 [words].
        number_of: the number of each token that has one.
    """

    def __init__(self, tokens: Sequence[int], device: torch.device, unknown: int | None = None) -> None:
        self.tokens = torch.tensor(tokens, device=device)
        self.number_of = {token: number for number, token in enumerate(tokens)}
        self.unknown = unknown
        self._samplers: dict[int, tuple[Sampler, int]] = {}

    @classmethod
    def of(cls, config: ModelConfig, device: torch.device) -> Words | None:
        """What the configuration of a small model says; None where it speaks of nothing like that.

        Raises:
            UserError: it is no list of ascending tokens, one for each row of the head but the last.
        """
        tokens = config.source.get(TOKEN_MAP)
        if tokens is None:
            return None
        sound = isinstance(tokens, list) and bool(tokens) and all(type(token) is int for token in tokens)
        if not sound or tokens != sorted(set(tokens)) or len(tokens) != config.vocab_size - 1 or tokens[0] < 0:
            raise UserError(f"{TOKEN_MAP} must be {config.vocab_size - 1} different tokens in ascending order")
        return cls(tokens, device, len(tokens))

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, tokens: Sequence[int]) -> list[int]:
        """Tokens as the small model reads them."""
        if self.unknown is None:
            return list(tokens)
        return [self.number_of.get(token, self.unknown) for token in tokens]

    def known(self, tokens: Sequence[int]) -> list[int]:
        """Numbers of those tokens that have one."""
        return [self.number_of[token] for token in tokens if token in self.number_of]

    def distribution(self, request: Request, logits: Tensor, paths: Sequence[Sequence[int]]) -> Distribution:
        """Processed among the words, then named by the target's ids; further logits are left out."""
        logits, sampler, grammar = logits[:, : len(self)], self.sampler(request), request.sampler.grammar
        if grammar is not None:
            allowed = grammar.masks(paths).to(logits.device)[:, self.tokens]
            logits = logits.masked_fill(~allowed, -torch.inf)
        local = processed(sampler, logits, [self.known(path) for path in paths])
        ids = self.tokens if local.ids is None else self.tokens[local.ids]
        return Distribution(local.scores, ids.expand(local.scores.shape), request.sampler.vocabulary)

    def sampler(self, request: Request) -> Sampler:
        """The request's sampling among the words; its penalties know what was committed."""
        sampler, told = self._samplers.get(request.id) or (self._local(request), 0)
        if request.params.penalised:
            sampler.committed(self.known(request.output[told:]))
            told = len(request.output)
        self._samplers[request.id] = (sampler, told)
        return sampler

    def _local(self, request: Request) -> Sampler:
        bias = {self.number_of[token]: by for token, by in request.params.logit_bias.items() if token in self.number_of}
        prompt = self.known(request.tokens[: request.prompt_length])
        return Sampler(replace(request.params, logit_bias=bias), request.choice, prompt, len(self))

    def end(self, request: Request) -> None:
        """Forget a request."""
        self._samplers.pop(request.id, None)
