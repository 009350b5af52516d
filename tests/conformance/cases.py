"""What the conformance tests run: every registered lossless method, on many prompts, with many kinds of sampling."""

from __future__ import annotations

import random
from typing import Any

from hasten import SamplingParams, methods
from helpers import VOCABULARY

VARIANTS = {
    "plain": ["plain"],
    "ngram": ["ngram", "ngram:length=3,minimum=1,maximum=2"],
    "draft-model": [
        "draft-model",
        "draft-model:confidence=0,length=4",
        "draft-model:width=3,length=3",
    ],
}
"""Specifications to run per method; a method without an entry runs with its defaults."""

SPECS = [
    spec for slug, method in methods().items() if method.exactness == "lossless" for spec in VARIANTS.get(slug, [slug])
]

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8},
    "top-k": {"temperature": 0.8, "top_k": 20},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "min-p": {"temperature": 1.3, "min_p": 0.05},
    "penalties": {
        "temperature": 0.8,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
    },
    "greedy-penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.2},
    "greedy-bias": {"logit_bias": {5: 3.0, 17: -100.0, 40: 2.0}},
    "bias": {"temperature": 0.8, "logit_bias": {5: 3.0, 17: -100.0, 40: 2.0}},
    "everything": {
        "temperature": 0.9,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.05,
        "presence_penalty": -0.2,
        "frequency_penalty": 0.1,
        "logit_bias": {8: 1.5},
        "logprobs": 0,
    },
}
MAX_TOKENS = 20


def _prompts(count: int) -> list[list[int]]:
    """Unequal lengths from 1 to 60; every third repeats a motif, so that lookup has something to find."""
    rng = random.Random(0)
    made = []
    for number in range(count):
        length = 1 + number * 7 % 60
        motif = [rng.randrange(2, VOCABULARY) for _ in range(length if number % 3 else 1 + length // 4)]
        made.append((motif * length)[:length])
    return made


PROMPTS = _prompts(104)


def params(number: int, kind: str, **changes: Any) -> SamplingParams:
    """The parameters of one prompt; its number is the seed."""
    return SamplingParams(**{"max_tokens": MAX_TOKENS, "seed": number, "logprobs": 3, **KINDS[kind], **changes})
