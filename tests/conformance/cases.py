"""What the conformance tests run: every registered lossless method, on many prompts, with many kinds of sampling."""

from __future__ import annotations

import random
from typing import Any

from hasten import SamplingParams
from hasten.engine import decoders
from helpers import VOCABULARY

VARIANTS = {
    "plain": ["plain"],
    "auto": ["auto:candidates=ngram/token-recycling/draft-model", "auto:candidates=blend"],
    "blend": ["blend", "blend:nodes=40,least=0.02,max_requests=4"],
    "ngram": ["ngram", "ngram:length=3,minimum=1,maximum=2"],
    "copyspec": ["copyspec:gamma=2", "copyspec:gamma=1,length=4,limit=16,occurrence=first,retry=true"],
    # With a matrix of their own, requests do not change each other's figures.
    "token-recycling": ["token-recycling:shared=false,nodes=16", "token-recycling:shared=false,nodes=56,candidates=4"],
    "aded": ["aded:shared=false", "aded:shared=false,search=puct,iterations=30,nodes=12,increment=0.5"],
    "stand": [
        "stand:shared=false,minimum=1,maximum=2,nodes=16",
        "stand:shared=false,minimum=1,maximum=1,sampled=false,rejected=true",
    ],
    "suffix": [
        "suffix",
        "suffix:tree=true,depth=24,factor=2,max_requests=8",
        "suffix:max_requests=0,min_probability=0",
    ],
    "draft-model": [
        "draft-model",
        "draft-model:confidence=0,length=4",
        "draft-model:width=3,length=3",
    ],
    # Of two layers: mostly sure behind the first, and now and then.
    "s2d": ["s2d:exits=1/2,threshold=0.3,confidence=0,length=6", "s2d:exits=1/2,threshold=0.8,confidence=0"],
    "dyspec": ["dyspec:nodes=12", "dyspec:construction=fixed,nodes=10,max_depth=4"],
    "rapid": ["rapid:head=1,tail=3,chunk=8,least=8", "rapid:head=2,tail=2,chunk=8,least=0,share=0.3,confidence=0.01"],
    "vocabtrim": ["vocabtrim:tokens=90,confidence=0", "vocabtrim:tokens=60,forced=false,width=3,length=3"],
    "specmemo": [
        "specmemo:drafter=ngram",
        "specmemo:budget=64MiB,nodes=12,drafter=aded:shared=false",
    ],
    "chimera": ["chimera:nodes=12,least=0,sized=false", "chimera:tree=static,nodes=30,ranks=3,width=6,sized=false"],
    # The head beside the model is EAGLE-1's. Folders are seen from the model's own (conftest.py).
    "eagle": [
        "eagle:nodes=12,depth=4,least=0,sized=false",
        "eagle:tree=chain,depth=6,least=0,sized=false",
        "eagle:head=heads/eagle-3,nodes=40,depth=3,least=0,sized=false",
    ],
    # With a prefix layer they are Hydra++'s.
    "hydra": [
        "hydra:nodes=12,least=0,sized=false",
        "hydra:tree=static,nodes=30,ranks=3,width=4,sized=false",
        "hydra:head=heads/hydra-prefix,nodes=12,least=0,sized=false",
    ],
    "medusa": ["medusa:nodes=12,sized=false", "medusa:tree=static,nodes=30,sized=false"],
    "hidden-transfer": ["hidden-transfer:sized=false", "hidden-transfer:sized=false,nodes=30,rows=90,ranks=20"],
    "ppd": ["ppd:sized=false", "ppd:sized=false,nodes=30,rows=90,ranks=20"],
    # A drafter of two layers has none to compute at once: tests/methods/systems/test_easyspec.py has a deeper one.
    "easyspec": ["easyspec:confidence=0,length=4"],
    "mirror-sd": [
        "mirror-sd:executor=inline",
        "mirror-sd:executor=inline,confidence=0,length=3,width=8",
        "mirror-sd:executor=inline,confidence=0,streams=0",
    ],
    # It needs more layers than the model here has: tests/methods/test_swift.py decodes with a deeper one.
    "swift": [],
    # They need a model that fills masked positions: tests/methods/diffusion has one.
    "freedave": [],
    "nbdiff-draft": [],
    "tidar": [],
}
"""Specifications to run per method; a method without an entry runs with its defaults."""

SPECS = [
    spec for slug, method in decoders().items() if method.exactness == "lossless" for spec in VARIANTS.get(slug, [slug])
]

LEARNING = ("auto", "blend", "suffix", "token-recycling", "aded", "stand", "swift")
"""Methods that learn from one request for the next: their figures depend on what they have seen, and so do their tokens
with acceptance rules other than `match`, unless they are told not to share."""

INDEPENDENT = [
    spec
    for spec in SPECS
    if spec.partition(":")[0] not in LEARNING or "shared=false" in spec or "max_requests=0" in spec
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
    "greedy-bans": {"min_tokens": 15, "stop_token_ids": [9, 70], "bad_words": ["th", (40,), (17, 5), (60,)]},
    "bans": {"temperature": 0.8, "min_tokens": 8, "stop_token_ids": [9, 70], "bad_words": ["a", (40,), (17, 5)]},
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
