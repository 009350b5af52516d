"""Compositions: the first drafter that has something to say is heard, and all see everything."""

from __future__ import annotations

import pytest

from hasten import SamplingParams, UserError
from hasten.engine import Draft, Drafter, registry
from hasten.engine.creation import create, is_lossless
from hasten.engine.drafting.composition import FirstOf
from hasten.engine.registry import split
from hasten.model import load_model
from hasten.model.checkpoint import resolve


class Recorder(Drafter):
    """Proposes for prompts whose length it likes, and remembers what it was told."""

    def __init__(self, likes: int, token: int) -> None:
        self.likes, self.token = likes, token
        self.told: list[tuple[str, int]] = []

    @property
    def memory_bytes(self) -> int:
        return self.likes

    def begin(self, request):
        self.told.append(("begin", request.id))

    def propose(self, request, budget):
        self.told.append(("propose", request.id))
        return Draft.chain([self.token]) if request.prompt_length % self.likes == 0 else Draft()

    def observe_prompt(self, request, start, taps):
        self.told.append(("prompt", request.id))

    def observe(self, request, seen):
        self.told.append(("observe", request.id))

    def end(self, request):
        self.told.append(("end", request.id))


def test_the_next_is_asked_only_where_those_before_are_silent(llm):
    first, second = Recorder(2, 5), Recorder(3, 6)
    both = FirstOf([first, second])
    prompts = [[2] * length for length in (6, 4, 9, 5)]
    llm.generate(prompts, SamplingParams(max_tokens=3, ignore_eos=True), both)
    requests = sorted({number for _, number in first.told})
    asked = {request: [("propose", request) in each.told for each in (first, second)] for request in requests}
    assert list(asked.values()) == [[True, False], [True, False], [True, True], [True, True]]
    for each in (first, second):
        for request in requests:
            kinds = [kind for kind, number in each.told if number == request]
            assert kinds[0] == "begin" and kinds[-1] == "end"
            assert "prompt" in kinds and "observe" in kinds
    assert both.memory_bytes == 5


def test_tokens_are_those_of_plain_decoding(llm):
    prompts = [[2, 3, 4] * 5, [7] * 9, list(range(5, 40))]
    params = SamplingParams(max_tokens=16, temperature=0.7, seed=4)
    expected = [each.token_ids for each in llm.generate(prompts, params, "plain")]
    composed = llm.generate(prompts, params, "ngram:minimum=1+draft-model:length=3")
    assert [each.token_ids for each in composed] == expected
    assert sum(each.choices[0].statistics.accepted for each in composed) > 0


def test_specifications_are_split_at_methods_only():
    assert split("ngram") == ["ngram"]
    assert split("ngram:length=3+draft-model") == ["ngram:length=3", "draft-model"]
    assert split("draft-model:model=a+b/c") == ["draft-model:model=a+b/c"]
    assert split("draft-model:model=a+b+ngram:length=2") == ["draft-model:model=a+b", "ngram:length=2"]


@pytest.mark.parametrize("spec", ["ngram+", "+ngram", "ngram+nope", "ngram+ngrm"])
def test_an_unknown_part_is_named(llm, spec):
    with pytest.raises(UserError, match="unknown method"):
        create(spec, registry.Target(llm.model))


def test_a_part_that_must_be_the_whole_method_is_named():
    model = load_model(resolve("tiny-tidar"))
    with pytest.raises(UserError, match=r"^tidar cannot be a part of a composition, since it must be the whole"):
        create("ngram+tidar", registry.Target(model))


def test_exactness_is_that_of_all_parts():
    assert is_lossless("ngram+plain")
