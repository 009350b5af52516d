"""Prompts with embeddings: the model's own embeddings of tokens give what the tokens give, with every drafter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import KINDS, PROMPTS, SPECS, params

from hasten import LLM, SamplingParams, UserError
from hasten.engine import Embedded, Engine, Limits
from hasten.engine.prompt import EMBEDDED
from hasten.model.native.library import LIBRARY

NUMBERS = [number for number in range(8, len(PROMPTS), 11) if len(PROMPTS[number]) > 8]
# What penalises the prompt's words cannot see those that are no words.
FREE = [kind for kind, settings in KINDS.items() if "repetition_penalty" not in settings]


def embedded(llm: LLM, number: int) -> list[int | Embedded]:
    """The prompt with two runs of its tokens as embeddings, at both ends of it or side by side."""
    tokens = PROMPTS[number]
    states = llm.model.embedding[torch.tensor(tokens)]
    low, high = len(tokens) // 3, len(tokens) // 2
    if number % 2:
        return [Embedded("a", states[:low]), *tokens[low:high], Embedded("b", states[high:])]
    return [*tokens[:low], Embedded("a", states[low:high]), Embedded("b", states[high:-1]), tokens[-1]]


@pytest.mark.parametrize("spec", SPECS)
def test_the_models_own_embeddings(llm: LLM, plain, spec: str) -> None:
    work = [(number, FREE[index % len(FREE)]) for index, number in enumerate(NUMBERS)]
    prompts = [embedded(llm, number) for number, _ in work]
    got = llm.generate(prompts, [params(number, kind) for number, kind in work], spec)
    for (number, kind), generation in zip(work, got, strict=True):
        assert generation.token_ids == plain(number, kind).token_ids
        assert generation.prompt_token_ids.count(EMBEDDED) > 2
    assert llm.engine.cache.used_bytes == 0


@pytest.mark.parametrize("backend", ["torch", *(["native"] if LIBRARY.exists() else [])])
@pytest.mark.parametrize("limits", [{"rows": 5}, {"rows": 7, "sequences": 2}])
def test_in_pieces_and_by_choices(llm: LLM, tiny: Path, backend: str, limits: dict[str, int]) -> None:
    """Pieces of a prompt begin and end within spans; choices share them; a small cache has them read twice."""
    own = LLM(tiny, dtype="float32", backend=backend)
    small = Engine(
        own.model, own.tokenizer, own.engine.end_ids, Limits(**limits), None, own.engine.cache.sequence_bytes(64) * 5
    )
    asked = SamplingParams(max_tokens=40, temperature=0.9, seed=5, n=2, ignore_eos=True)
    for number in NUMBERS[:4]:
        expected = [choice.token_ids for choice in llm.generate([PROMPTS[number]], asked)[0].choices]
        requests = small.add(embedded(own, number), asked, "ngram")
        for _ in small.run():
            pass
        assert [request.output for request in requests] == expected
        assert [span.name for span in requests[0].spans] == ["a", "b"]


def test_in_a_batch_with_others_and_streamed(llm: LLM) -> None:
    number = NUMBERS[0]
    prompt, asked = embedded(llm, number), SamplingParams(max_tokens=12, ignore_eos=True)
    expected = llm.generate([PROMPTS[number], "the cat"], asked)
    got = llm.generate([prompt, "the cat"], asked, ["suffix", "plain"])
    assert [each.token_ids for each in got] == [each.token_ids for each in expected]
    streamed = [token for chunk in llm.stream(prompt, asked) for token in chunk.token_ids]
    assert streamed == expected[0].token_ids


@pytest.mark.parametrize(
    "states, words",
    [
        (torch.zeros(3, 47), r"must be \[rows, 48\] of floats, not \[3, 47\] of float32"),
        (torch.zeros(48), r"not \[48\] of float32"),
        (torch.zeros(0, 48), r"not \[0, 48\] of float32"),
        (torch.zeros(2, 48, dtype=torch.int64), r"not \[2, 48\] of int64"),
        (torch.full((2, 48), torch.nan), "hold NaN or infinity"),
        (torch.zeros(300, 48), "the prompt has 301 tokens, which leaves no room"),
    ],
)
def test_embeddings_that_do_not_fit(llm: LLM, states: torch.Tensor, words: str) -> None:
    with pytest.raises(UserError, match=words):
        llm.generate([[5, Embedded("picture", states)]])
    assert not llm.engine.busy


def test_a_canvas_has_no_embeddings(diffusion_llm) -> None:
    llm = diffusion_llm("full")
    with pytest.raises(UserError, match="embeddings cannot be had from a model that fills masked positions"):
        llm.generate([[5, Embedded("picture", torch.zeros(2, 48))]], SamplingParams(max_tokens=4))
    assert not llm.engine.busy
