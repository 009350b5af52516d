"""A lossless method gives token for token what plain decoding gives: greedy and sampling, alone and in batches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from cases import KINDS, MAX_TOKENS, PROMPTS, SPECS, params
from transformers import LlamaForCausalLM

from hasten import SamplingParams
from hasten.engine import ROOT, Draft, register, registry
from helpers import Scripted, same

PROPOSING = [spec for spec in SPECS if spec != "plain"]


@pytest.mark.parametrize("spec", PROPOSING)
def test_alone(llm, plain, spec):
    """Every prompt, in turns greedy and sampled."""
    accepted = {"greedy": 0, "sampled": 0}
    for number, prompt in enumerate(PROMPTS):
        kind = "sampled" if number % 2 else "greedy"
        got = llm.generate([prompt], params(number, kind), spec)[0].choices[0]
        same(got, plain(number, kind))
        accepted[kind] += got.statistics.accepted
    # Where nothing is ever accepted, nothing is proved; such a method needs an entry in cases.VARIANTS.
    assert min(accepted.values()) > 10


@pytest.mark.parametrize("spec", PROPOSING)
def test_every_kind_of_sampling(llm, plain, spec):
    chosen = [(number, kind) for kind in KINDS for number in range(len(kind) % 3, len(PROMPTS), 12)]
    generations = llm.generate([PROMPTS[number] for number, _ in chosen], [params(*each) for each in chosen], spec)
    accepted = dict.fromkeys(KINDS, 0)
    for (number, kind), generation in zip(chosen, generations, strict=True):
        same(generation.choices[0], plain(number, kind))
        accepted[kind] += generation.choices[0].statistics.accepted
    assert sum(count > 0 for count in accepted.values()) >= len(KINDS) // 2


def test_mixed_batches_of_eight(llm, plain):
    rng = random.Random(1)
    mixed = [(number, list(KINDS)[number % len(KINDS)], rng.choice(SPECS)) for number in range(len(PROMPTS))]
    rng.shuffle(mixed)
    for start in range(0, len(mixed), 8):
        batch = mixed[start : start + 8]
        generations = llm.generate(
            [PROMPTS[number] for number, _, _ in batch],
            [params(number, kind) for number, kind, _ in batch],
            [spec for _, _, spec in batch],
        )
        for (number, kind, _), generation in zip(batch, generations, strict=True):
            same(generation.choices[0], plain(number, kind))


@pytest.fixture(scope="module")
def choices(llm):
    """Four choices each of some prompts, by plain decoding."""
    asked = {number: params(number, "sampled", n=4) for number in (3, 30, 59)}
    return {number: (each, llm.generate([PROMPTS[number]], each, "plain")[0].choices) for number, each in asked.items()}


@pytest.mark.parametrize("spec", PROPOSING)
def test_choices(llm, plain, choices, spec):
    """Each of n choices is plain decoding's choice of that number; the first is what n=1 gives."""
    for number, (asked, expected) in choices.items():
        got = llm.generate([PROMPTS[number]], asked, spec)[0].choices
        for mine, theirs in zip(got, expected, strict=True):
            same(mine, theirs)
        same(got[0], plain(number, "sampled"))
        assert len({tuple(choice.token_ids) for choice in got}) > 1


@pytest.mark.parametrize("spec", ["plain", "ngram:minimum=1,maximum=2", "suffix", "token-recycling"])
def test_looked_up_drafts_need_no_rejection(llm, plain, spec):
    """With `max`, too, a draft without sampled nodes gives plain decoding's text, whatever was learned before."""
    for number in range(0, len(PROMPTS), 6):
        got = llm.generate([PROMPTS[number]], params(number, "sampled", acceptance="max"), spec)[0].choices[0]
        same(got, plain(number, "sampled"))


def test_seed_decides(llm):
    def answer(seed: int) -> list[int]:
        return llm.generate([PROMPTS[9]], SamplingParams(max_tokens=12, temperature=1, seed=seed))[0].token_ids

    assert answer(1) == answer(1)
    assert len({tuple(answer(seed)) for seed in range(6)}) > 3


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_what_transformers_generates(llm, tiny, penalty):
    reference = LlamaForCausalLM.from_pretrained(tiny, attn_implementation="eager", dtype=torch.float32).eval()
    chosen = PROMPTS[::8]
    asked = SamplingParams(max_tokens=MAX_TOKENS, repetition_penalty=penalty)
    for prompt, generation in zip(chosen, llm.generate(chosen, asked, "plain"), strict=True):
        with torch.inference_mode():
            whole = reference.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=MAX_TOKENS,
                repetition_penalty=penalty,
                pad_token_id=0,
            )
        assert generation.token_ids == whole[0, len(prompt) :].tolist()


@dataclass(frozen=True)
class ThirdPartyParameters:
    step: int = 1


@pytest.fixture
def third_party() -> Iterator[str]:
    """A method that somebody else registers: a tree of tokens from the context, right now and then."""

    @register(
        "third-party",
        family="drafters",
        exactness="lossless",
        paper="",
        title="A method from elsewhere",
        parameters=ThirdPartyParameters,
    )
    class ThirdParty(Scripted):
        def __init__(self, target, parameters):
            super().__init__(lambda request: self.guess(request.tokens[:: -parameters.step]))

        @staticmethod
        def guess(recent):
            seen = list(dict.fromkeys(recent))[:6]
            tokens, parents = list(seen), [ROOT] * len(seen)
            for node in range(len(seen)):
                tokens += seen[:3]
                parents += [node] * len(seen[:3])
            return Draft(tokens, parents)

    yield "third-party:step=1"
    registry._METHODS.pop("third-party")


def test_third_party_method(llm, plain, third_party):
    numbers = range(0, len(PROMPTS), 4)
    asked = [params(number, "greedy" if number % 8 else "sampled") for number in numbers]
    generations = llm.generate([PROMPTS[number] for number in numbers], asked, third_party)
    for number, generation in zip(numbers, generations, strict=True):
        same(generation.choices[0], plain(number, "greedy" if number % 8 else "sampled"))
    assert sum(generation.choices[0].statistics.accepted for generation in generations) > 5


def test_acceptance_setting_changes_nothing_when_greedy(llm, plain):
    for acceptance in ("max", "typical"):
        for spec in PROPOSING:
            asked = replace(params(33, "greedy"), acceptance=acceptance)
            same(llm.generate([PROMPTS[33]], asked, spec)[0].choices[0], plain(33, "greedy"))
