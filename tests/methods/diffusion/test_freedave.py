"""FreeDave gives what one token per pass gives, never in more passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from canvases import BLOCKS, CONFIGS, FULL, PROMPTS, by_position, canvas_of, decode, oracle, run

from hasten import LLM
from hasten.engine import Engine, Request, SamplingParams
from hasten.model import Model, load_model

Models = Callable[..., Any]
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 4},
    "penalties": {
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 5,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.5,
    },
    "greedy-penalties": {"repetition_penalty": 1.5, "frequency_penalty": 0.3},
}
SETTINGS = [
    *[(name, options) for name in FULL for options in ("", ",cache=prefix", ",cache=dual", ",part=2,order=margin")],
    *[(name, options) for name in BLOCKS for options in ("", ",part=3,order=entropy")],
]


def check(drafted: Request, static: Request) -> None:
    """The same canvas in no more passes, filled in the same order but for what came together."""
    assert drafted.output == static.output
    assert drafted.statistics.steps <= static.statistics.steps
    assert 0 <= drafted.statistics.accepted <= drafted.statistics.proposed
    ours, theirs = canvas_of(drafted), canvas_of(static)
    # A request may be over before its canvas is.
    both = ~ours.masked & ~theirs.masked
    assert torch.equal(ours.ids[both], theirs.ids[both])
    assert (ours.committed_at[both][theirs.committed_at[both].argsort(stable=True)].diff() >= 0).all()


def compare(model: Model, options: str, drafts: int, prompts: list[list[int]], **params: Any) -> None:
    """FreeDave and one token per pass on the same prompts, each in a batch."""
    jobs = [(prompt, SamplingParams(max_tokens=9, **params)) for prompt in prompts]
    static, drafted = (
        run(Engine(model), *[(*job, f"{method},block=4{options}") for job in jobs])
        for method in ("denoise:per_step=1", f"freedave:drafts={drafts}")
    )
    for one, other in zip(drafted, static, strict=True):
        check(one, other)


@pytest.mark.parametrize(("name", "options"), SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_law_is_decoded_as_token_by_token(name: str, options: str, kind: str) -> None:
    for drafts in (1, 2, 4, 8):
        compare(oracle(name), options, drafts, PROMPTS[1:4:2], **KINDS[kind])


@pytest.mark.parametrize(("name", "options"), SETTINGS)
def test_a_network_is_decoded_as_token_by_token(name: str, options: str, models: Models) -> None:
    for drafts in (2, 4, 8):
        compare(models(name).model, options, drafts, PROMPTS[0:4:3])
    compare(models(name).model, options, 4, PROMPTS[1:2], **KINDS["penalties"])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_network_in_float32_on_the_default_backend(name: str, models: Models) -> None:
    compare(load_model(models(name).folder, dtype="float32", device="cpu"), "", 4, PROMPTS[::2])


@pytest.mark.parametrize(("drafts", "passes", "rows"), [(1, 4, 16), (2, 3, 16), (3, 2, 16), (4, 2, 16), (8, 2, 16)])
def test_guesses_that_are_all_right(drafts: int, passes: int, rows: int) -> None:
    """A block of 4 that ranks the same whatever is committed: the looks of 2 drafts take 4, 8 and 4 rows."""
    law = by_position({4: 1, 5: 2, 6: 3, 7: 4}, {4: 2.0, 5: 4.0, 6: 1.0, 7: 3.0})
    request = decode(oracle("block-causal-same", law), f"freedave:drafts={drafts}", PROMPTS[2], max_tokens=4)
    assert request.output == [1, 2, 3, 4]
    figures = request.statistics
    assert (figures.steps, figures.rows) == (passes, rows)
    assert figures.accepted == figures.proposed


def test_the_worked_example() -> None:
    """One pass ranks 2 > 0 > 5 of six positions; after 2 and 0 it is 3 instead of 5: the second guess is right, the
    third is not."""
    tokens = {1: 2, 3: 1, 4: 4, 6: 3}

    def law(seen: list[tuple[int, int]], position: int) -> torch.Tensor:
        known = dict(seen)
        sure = {1: 4.0, 2: 1.0, 3: 5.0, 4: 4.5 if known[1] == 2 else 0.5, 5: 0.8, 6: 3.0}
        return by_position(tokens, sure)(seen, position)

    request = decode(oracle("full-same", law), "freedave:drafts=3,block=6", [0], max_tokens=6)
    # The first look gives 2, the second verifies 0 and shows that 3 comes next.
    assert canvas_of(request).committed_at.tolist()[1:5] == [2, 3, 1, 2]
    check(request, decode(oracle("full-same", law), "denoise:block=6", [0], max_tokens=6))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_end_of_the_text_and_streaming(name: str) -> None:
    prompt, end = PROMPTS[3], decode(oracle(name), "denoise:block=4", PROMPTS[3], max_tokens=9).output[4]
    static = decode(oracle(name), "denoise:block=4", prompt, end_ids=[end], max_tokens=9)
    engine = Engine(oracle(name), end_ids=[end])
    (request,) = engine.add(prompt, SamplingParams(max_tokens=9), "freedave:block=4")
    came = [token for progress in engine.run() for token in progress.tokens]
    assert came == request.output == static.output
    assert request.finish_reason == static.finish_reason == "stop"
    assert engine.cache.used_bytes == 0


def test_stop_strings(readable: Any) -> None:
    llm = LLM(readable, dtype="float32")
    prompt, params = "another morning", {"max_tokens": 24, "ignore_eos": True}
    whole = llm.generate(prompt, SamplingParams(**params), "denoise:block=8")[0]
    drafted = llm.generate(prompt, SamplingParams(**params), "freedave:block=8")[0]
    assert drafted.token_ids == whole.token_ids
    stop = whole.text[len(whole.text) // 2 :][:3]
    stopped = llm.generate(prompt, SamplingParams(**params, stop=(stop,)), "freedave:block=8")[0]
    assert stopped.text == whole.text.partition(stop)[0]
