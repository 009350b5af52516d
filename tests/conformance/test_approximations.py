"""Lossy methods, among them those that compute rows themselves: nothing around a request changes what they give."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from cases import KINDS, PROMPTS, SPECS, params

from hasten import LLM, SamplingParams
from hasten.engine import Approximation, Constraint, Engine, Limits, decoders
from hasten.llm import Completion
from hasten.model.native.library import LIBRARY
from helpers import make_model, same

LAYERS = 7
VARIANTS = {
    "skipdecode": ["skipdecode:share=0.7", "skipdecode:most=5,least=3,warm=2,length=8"],
    "ffn-skipllm": ["ffn-skipllm:warmup=2", "ffn-skipllm:ratio=0.2,run=1,warmup=0"],
    "lud": ["lud:beta=0.03,repeated=0.2", "lud:beta=0.05,placeholders=1,repeated=0.01"],
}
"""Specifications to run per method."""
UNTOUCHED = [
    "skipdecode",
    "ffn-skipllm:warmup=0,threshold=1.1",
    "lud:beta=1.01",
    "lud:beta=0.01,repeated=0.01,verified=true",
]
"""Those that leave nothing out."""
MINE = [spec for specs in VARIANTS.values() for spec in specs]
NUMBERS = list(range(3, len(PROMPTS), 11))
WORK = [(number, list(KINDS)[index % len(KINDS)]) for index, number in enumerate(NUMBERS)]
BACKENDS = ["torch", *(["native"] if LIBRARY.exists() else [])]


@pytest.fixture(scope="module")
def load(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LLM]:
    """A model whose inner layers' MLPs add little to the residual stream, by backend."""
    folder = tmp_path_factory.mktemp("deep") / "deep"
    shutil.copytree(tiny, folder)
    shutil.copytree(tiny.with_name("tiny-draft"), folder.with_name("deep-draft"))
    model = make_model(num_hidden_layers=LAYERS)
    with torch.no_grad():
        for layer in model.model.layers[1:-1]:
            layer.mlp.down_proj.weight.mul_(0.25)
    model.save_pretrained(folder)

    @cache
    def make(backend: str) -> LLM:
        return LLM(folder, dtype="float32", backend=backend)

    return make


@pytest.fixture(scope="module")
def deep(load: Callable[[str], LLM]) -> LLM:
    return load(BACKENDS[-1])


@pytest.fixture(scope="module")
def alone(deep: LLM) -> Callable[[str, int, str], Completion]:
    """(specification, prompt's number, kind of sampling) to the answer, each decoded by itself, once."""

    @cache
    def answer(spec: str, number: int, kind: str) -> Completion:
        return deep.generate([PROMPTS[number]], params(number, kind), spec)[0].choices[0]

    return answer


def test_all_of_them_are_here():
    """Those of models that read from left to right; what `rapid-transfer` gives is a law, with a test of its own."""
    lossy = {slug for slug, each in decoders().items() if each.exactness == "lossy" and each.role == "drafter"}
    assert lossy - {"rapid-transfer"} == VARIANTS.keys()


@pytest.mark.parametrize("spec", UNTOUCHED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_leaves_nothing_out_is_plain_decoding(load, backend, spec):
    llm = load(backend)
    prompts, asked = [PROMPTS[number] for number, _ in WORK], [params(*each) for each in WORK]
    for mine, theirs in zip(llm.generate(prompts, asked, spec), llm.generate(prompts, asked, "plain"), strict=True):
        same(mine.choices[0], theirs.choices[0])


@pytest.mark.parametrize("spec", MINE)
def test_batches_beside_all_other_methods(deep, alone, spec):
    """In batches, some of whose prompts are read in pieces, beside drafters: the tokens of a request alone."""
    engine = Engine(deep.model, deep.tokenizer, deep.engine.end_ids, Limits(rows=24, sequences=12), str(deep.folder))
    requests = []
    for index, (number, kind) in enumerate(WORK):
        requests.append(engine.add(PROMPTS[number], params(number, kind), spec)[0])
        engine.add(PROMPTS[number], params(number, kind), SPECS[index % len(SPECS)])
        engine.step()
    for _ in engine.run():
        pass
    for (number, kind), request in zip(WORK, requests, strict=True):
        assert request.output == alone(spec, number, kind).token_ids
        assert request.finish_reason == alone(spec, number, kind).finish_reason
    assert engine.cache.used_bytes == 0


@pytest.mark.parametrize("spec", MINE)
def test_it_does_leave_something_out(deep, alone, spec):
    """Where it would not change a token, nothing is proved."""
    plain = [deep.generate([PROMPTS[number]], params(number, kind), "plain")[0].token_ids for number, kind in WORK]
    assert [alone(spec, *each).token_ids for each in WORK] != plain


@pytest.mark.parametrize("spec", MINE)
def test_preemption_changes_nothing(deep, alone, spec):
    """Requests that are read again keep of each row what they kept before."""
    numbers = NUMBERS[:5]
    asked = [params(number, "sampled", ignore_eos=True, max_tokens=40) for number in numbers]
    prompts = [PROMPTS[number] for number in numbers]
    expected = [deep.generate([prompt], own, spec)[0].token_ids for prompt, own in zip(prompts, asked, strict=True)]
    engine = Engine(deep.model, deep.tokenizer, deep.engine.end_ids, None, str(deep.folder))
    requests = [engine.add(prompt, own, spec)[0] for prompt, own in zip(prompts, asked, strict=True)]
    for number in (1, 3):
        while len(requests[number].output) < 6 * number:
            engine.step()
        engine._placement.preempt(requests[number])
    for _ in engine.run():
        pass
    assert [request.output for request in requests] == expected
    assert all(requests[number].statistics.prompt_rows > len(prompts[number]) for number in (1, 3))
    assert engine.cache.used_bytes == 0


@pytest.mark.parametrize("spec", MINE)
def test_choices_streams_stops_and_constraints(deep, alone, spec):
    asked = params(30, "sampled", n=3)
    together = deep.generate([PROMPTS[30]], asked, spec)[0].choices
    same(together[0], alone(spec, 30, "sampled"))
    assert len({tuple(each.token_ids) for each in together}) > 1
    text = "".join(chunk.text for chunk in deep.stream(PROMPTS[30], params(30, "sampled"), spec))
    assert text == together[0].text
    word = together[0].text[4:6]
    stopped = deep.generate([PROMPTS[30]], params(30, "sampled", stop=[word]), spec)[0].choices[0]
    assert stopped.finish_reason == "stop" and together[0].text.startswith(stopped.text) and word not in stopped.text
    held = deep.generate("the cat", SamplingParams(max_tokens=12, constraint=Constraint(regex="(a|b){3,9}")), spec)[0]
    assert set(held.text) <= {"a", "b"}
    assert deep.engine.cache.used_bytes == 0


@pytest.mark.parametrize("spec", MINE)
def test_prefixes_are_the_models_own(deep, spec):
    """A later prompt finds the earlier text in the cache, but nothing that an approximation made of its answer."""
    engine = Engine(deep.model, deep.tokenizer, deep.engine.end_ids, None, str(deep.folder), prefix_bytes=1 << 24)
    (first,) = engine.add(PROMPTS[40], params(40, "greedy", ignore_eos=True), spec)
    for _ in engine.run():
        pass
    longer = [*first.tokens, 5]
    (second,) = engine.add(longer, params(40, "greedy"), "plain")
    for _ in engine.run():
        pass
    own = len(PROMPTS[40]) if isinstance(first.drafter, Approximation) else first.read
    assert second.statistics.recalled_rows == own
    assert second.output == deep.generate([longer], params(40, "greedy"), "plain")[0].token_ids


@pytest.mark.parametrize("spec", MINE)
def test_abort_at_any_time(deep, spec):
    for steps in (0, 1, 3):
        requests = [deep.engine.add(PROMPTS[number], params(number, kind), spec)[0] for number, kind in WORK]
        for _ in range(steps):
            deep.engine.step()
        for request in requests:
            deep.engine.abort(request)
        assert not deep.engine.busy
        assert deep.engine.cache.used_bytes == 0


class Failing(Approximation):
    """Cannot compute anything."""

    def forward(self, requests, rows, wanted):
        raise RuntimeError("out of order")


def test_what_fails_ends_its_own_requests_only(deep):
    engine = Engine(deep.model, deep.tokenizer, deep.engine.end_ids)
    asked = replace(params(30, "greedy"), ignore_eos=True)
    (broken,), (whole,) = engine.add(PROMPTS[30], asked, Failing()), engine.add(PROMPTS[30], asked, "plain")
    while engine.busy:
        engine.step()
    assert broken.finish_reason == "error" and str(broken.error) == "out of order" and len(broken.output) == 1
    assert whole.output == deep.generate([PROMPTS[30]], asked, "plain")[0].token_ids
    assert engine.cache.used_bytes == 0
