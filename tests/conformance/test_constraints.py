"""Under a constraint every lossless method gives plain decoding's tokens, and every output is what was asked for."""

from __future__ import annotations

import json
import random
import re
from functools import cache

import numpy as np
import pytest
import torch
from cases import PROMPTS, SPECS
from laws import KEPT, PROMPT, Law, check_law, draft_model
from test_distributions import with_replacement
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hasten import Constraint, SamplingParams
from hasten.engine import Drafter, Engine, Limits
from hasten.llm import Completion
from hasten.model import OracleModel
from helpers import Bushy, Replay, same

PROPOSING = [spec for spec in SPECS if spec != "plain"]
SCHEMA = {
    "x-guidance": {"whitespace_flexible": False},
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"cat": {"enum": ["red", "moon"]}, "is": {"type": "boolean"}},
        "required": ["cat"],
        "additionalProperties": False,
    },
    "minItems": 2,
    "maxItems": 4,
}
REGEX = "(the (cat|moon)( and)? (sings|reads|dances)[,;] ?){2,4}(end|stop)"
CONSTRAINTS = [Constraint(json_schema=SCHEMA), Constraint(regex=REGEX)]
KINDS = {
    "greedy": {},
    "sampled": {"temperature": 1.0},
    "filtered": {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1},
}
NUMBERS = range(0, len(PROMPTS), len(PROMPTS) // 100)


def kind_of(number: int) -> str:
    return list(KINDS)[number % 3]


def params(number: int, kind: str, **changes) -> SamplingParams:
    constraint = CONSTRAINTS[number % 2]
    return SamplingParams(**{"max_tokens": 120, "seed": number, "constraint": constraint, **KINDS[kind], **changes})


def valid(number: int, answer: Completion) -> bool:
    """Whether a finished output is in its language."""
    if number % 2:
        return re.fullmatch(REGEX, answer.text) is not None
    value = json.loads(answer.text)
    return 2 <= len(value) <= 4 and all(
        list(item) in (["cat"], ["cat", "is"])
        and item["cat"] in ("red", "moon")
        and isinstance(item.get("is", True), bool)
        for item in value
    )


@pytest.fixture(scope="module")
def plain(llm):
    """(prompt's number, kind of sampling) to plain constrained decoding's answer, decoded alone, once."""

    @cache
    def answer(number: int, kind: str) -> Completion:
        return llm.generate([PROMPTS[number]], params(number, kind), "plain")[0].choices[0]

    return answer


def test_plain_output_is_valid(plain):
    answers = [(number, plain(number, kind_of(number))) for number in NUMBERS]
    assert len(answers) >= 100
    assert all(answer.finish_reason == "stop" and valid(number, answer) for number, answer in answers)
    # The language leaves the model something to say.
    assert len({answer.text for _, answer in answers}) > 30


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize("spec", PROPOSING)
def test_alone(llm, plain, spec, kind):
    accepted = 0
    for number in NUMBERS[::12]:
        got = llm.generate([PROMPTS[number]], params(number, kind), spec)[0].choices[0]
        same(got, plain(number, kind))
        accepted += got.statistics.accepted
    assert accepted > 0


def test_mixed_batches_of_eight(llm, plain):
    """All prompts, methods and kinds of sampling, and unconstrained requests among them."""
    rng = random.Random(3)
    mixed = [(number, kind_of(number), rng.choice(SPECS)) for number in NUMBERS]
    rng.shuffle(mixed)
    free: dict[int, list[int]] = {}
    for start in range(0, len(mixed), 7):
        batch = mixed[start : start + 7]
        other = batch[0][0]
        generations = llm.generate(
            [PROMPTS[number] for number, _, _ in [*batch, (other, "", "")]],
            [*(params(number, kind) for number, kind, _ in batch), SamplingParams(max_tokens=12)],
            [*(spec for _, _, spec in batch), "ngram"],
        )
        for (number, kind, _), generation in zip(batch, generations, strict=False):
            same(generation.choices[0], plain(number, kind))
        free[other] = generations[-1].token_ids
    for number, tokens in free.items():
        assert llm.generate([PROMPTS[number]], SamplingParams(max_tokens=12))[0].token_ids == tokens


@pytest.mark.parametrize("drafter", [Replay, Bushy])
def test_drafts_that_know_the_answer(llm, drafter):
    """Nearly everything is accepted, across the end of the text, and what is wrong beside it costs no rows."""
    numbers = NUMBERS[:24]
    asked = [params(number, "sampled") for number in numbers]
    expected = llm.generate([PROMPTS[number] for number in numbers], asked, "plain")
    got = llm.generate(
        [PROMPTS[number] for number in numbers], asked, drafter(expected, 6, beyond=expected[0].token_ids)
    )
    for mine, theirs in zip(got, expected, strict=True):
        same(mine.choices[0], theirs.choices[0])
        assert mine.choices[0].statistics.accepted >= 0.7 * len(mine.token_ids)


@pytest.mark.parametrize("spec", PROPOSING)
@pytest.mark.parametrize("acceptance", ["max", "typical"])
def test_other_rules_stay_inside_the_language(llm, spec, acceptance):
    for number in NUMBERS[:40:7]:
        (answer,) = llm.generate([PROMPTS[number]], params(number, "sampled", acceptance=acceptance), spec)[0].choices
        assert answer.finish_reason == "stop" and valid(number, answer)


# The law of constrained sampling

LAW, OTHER = Law(seed=1), Law(seed=2)
PATTERN = "(a[bc]|[bcd]e?)*"
NEXT = {
    "new": {0: "a", 1: "b", 2: "b", 3: "b"},
    "a": {1: "new", 2: "new"},
    "b": {0: "a", 1: "b", 2: "b", 3: "b", 4: "new"},
}
"""PATTERN as an automaton over a..e = 0..4: state and token to state; "a" is behind an a, "b" behind one of b, c, d."""


def letters() -> PreTrainedTokenizerFast:
    """One token per letter, a to e, and an end that the language knows nothing of."""
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate("abcde")}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def exact_law(temperature: float) -> np.ndarray:
    """Joint law of `KEPT` tokens behind the first: the model's, restricted to what the automaton allows."""
    table = np.exp(LAW.logits.double().numpy() / temperature)
    law = np.zeros((LAW.size,) * KEPT)
    waiting: list[tuple[tuple[int, ...], str, float]] = [((), "new", 1.0)]
    while waiting:
        output, state, chance = waiting.pop()
        if len(output) == KEPT + 1:
            law[output[1:]] += chance
            continue
        history = (*PROMPT, *output)
        weights = {token: table[history[-2], history[-1], token] for token in NEXT[state]}
        for token, weight in weights.items():
            waiting.append(((*output, token), NEXT[state][token], chance * weight / sum(weights.values())))
    return law


CASES = {
    "plain": ("plain", {}),
    "ngram, max": ("ngram:minimum=1", {"acceptance": "max"}),
    "chain": (draft_model(OTHER, confidence=0.0, length=3), {}),
    "chain, max": (draft_model(OTHER, length=3), {"acceptance": "max"}),
    "tree, max": (draft_model(OTHER, width=3, length=2), {"acceptance": "max", "temperature": 0.8}),
    # It knows nothing of the constraint: many of its samples are forbidden, and the rule must see them all.
    "with replacement, max": (with_replacement, {"acceptance": "max", "temperature": 0.8}),
}


@pytest.mark.parametrize("name", CASES)
def test_law(name):
    method, settings = CASES[name]
    engine = Engine(OracleModel(LAW, LAW.size), letters(), limits=Limits(sequences=100))
    drafter: str | Drafter = method(engine) if callable(method) else method
    groups, accepted = [], 0
    for seed in range(10):
        asked = SamplingParams(
            max_tokens=KEPT + 2, n=100, seed=seed,
            constraint=Constraint(regex=PATTERN), **{"temperature": 1.0, **settings},
        )  # fmt: skip
        requests = engine.add(PROMPT, asked, drafter)
        for _ in engine.run():
            pass
        groups.append(np.array([request.output[1 : 1 + KEPT] for request in requests]))
        accepted += sum(request.statistics.accepted for request in requests)
    check_law(groups, exact_law(settings.get("temperature", 1.0)))
    assert accepted > 300 or method == "plain"


def test_the_automaton_is_the_pattern():
    tokens = torch.cartesian_prod(*[torch.arange(5)] * 4).tolist()
    assert exact_law(1.0).sum() == pytest.approx(1)
    for output in tokens:
        state: str | None = "new"
        for token in output:
            state = NEXT[state].get(token) if state is not None else None
        text = "".join("abcde"[token] for token in output)
        # Behind an a the text is a beginning, not yet a member.
        member = any(re.fullmatch(PATTERN, text + tail) for tail in ("", "b"))
        assert member == (state is not None)
