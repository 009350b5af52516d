"""What a request's choices of tokens depend on, beside the logits."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof
from math import isfinite

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.engine.sampling.native.library import RuleStruct
from hasten.engine.sampling.noise import mix
from hasten.engine.sampling.params import LEAST, SamplingParams

TOKEN_STREAM = 1
"""Of noise; the coins of rejection rules have another one."""


class Rule:
    """Parameters as they are computed with, in float32, and what there was before, which penalties need.

    Args:
        params: the request's, with a seed.
        choice: which of its n choices this is.
        prompt: token ids, for the repetition penalty.
        vocabulary: size of the logits.

    Attributes:
        temperature: 0 is greedy.
        tame: below it, logits over the temperature may be infinite in float32: the largest is subtracted first.
        top_k: 0 where it keeps all.
        log_min_p: -infinity where it is off.
        stream: of the noise: `mix(position, state=stream)` is the key of a position.
        bias_tokens, bias_values: int64 and float32, what is added to logits.
        seen, counts: bool and float32 [vocabulary]: whether prompt or output have a token, and how often the output
            has it; None without penalties.
        address: of all this, for `sample.cpp`.
    """

    def __init__(self, params: SamplingParams, choice: int, prompt: Sequence[int], vocabulary: int) -> None:
        self.temperature, self.top_p = np.float32(params.temperature), np.float32(params.top_p)
        self.tame = np.float32(LEAST * max([1.0, *filter(isfinite, map(abs, params.logit_bias.values()))]))
        self.top_k = params.top_k if 0 < params.top_k < vocabulary else 0
        self.log_min_p = np.float32(torch.log(torch.tensor(params.min_p)).item())
        self.repetition = np.float32(params.repetition_penalty)
        self.presence, self.frequency = np.float32(params.presence_penalty), np.float32(params.frequency_penalty)
        self.stream = mix(params.seed or 0, choice, TOKEN_STREAM)
        self.bias_tokens = np.array(list(params.logit_bias), np.int64)
        self.bias_values = np.array(list(params.logit_bias.values()), np.float32)
        self.seen: NDArray[np.bool_] | None = None
        self.counts: NDArray[np.float32] | None = None
        if params.penalised:
            self.seen, self.counts = np.zeros(vocabulary, np.bool_), np.zeros(vocabulary, np.float32)
            self.seen[list(prompt)] = True
        self._struct = self._as_struct()
        self.address = addressof(self._struct)

    @property
    def filters(self) -> bool:
        """Whether tokens are ranked."""
        return self.top_k > 0 or bool(self.top_p < 1)

    def count(self, tokens: Sequence[int]) -> None:
        """The output has these, too."""
        if self.seen is not None and self.counts is not None:
            self.seen[list(tokens)] = True
            np.add.at(self.counts, list(tokens), 1)

    def _as_struct(self) -> RuleStruct:
        struct = RuleStruct(top_k=self.top_k, stream=self.stream, biases=len(self.bias_tokens))
        for name in ("temperature", "tame", "top_p", "log_min_p", "repetition", "presence", "frequency"):
            setattr(struct, name, float(getattr(self, name)))
        for name in ("bias_tokens", "bias_values", "seen", "counts"):
            array = getattr(self, name)
            setattr(struct, name, None if array is None else array.ctypes.data)
        return struct
