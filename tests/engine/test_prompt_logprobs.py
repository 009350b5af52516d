"""Log-probabilities of the prompt: the model's own, however the prompt is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten import LLM, SamplingParams, UserError
from hasten.cache import Cache
from hasten.engine import Embedded, Engine, Limits
from hasten.engine.prompt import EMBEDDED
from hasten.model import Rows

PROMPT = [5, 9, 70, 33, 8, 8, 90, 41, 3, 12, 77, 60]


def expected(llm: LLM, prompt: list[int]) -> torch.Tensor:
    """Log-softmax of the whole prompt's logits, in one pass."""
    model = llm.model
    with torch.inference_mode():
        rows = Rows.of(Cache(model.config.layers, model.cache_dtype, model.device).sequence(), prompt, 0)
        return model.forward(rows).log_softmax(-1)


def check(llm: LLM, got: list, prompt: list[int], top: int) -> None:
    table = expected(llm, prompt)
    assert len(got) == len(prompt) and got[0] is None
    for position, item in enumerate(got[1:]):
        assert item.token == prompt[position + 1]
        assert abs(item.logprob - float(table[position, item.token])) < 1e-4
        values = table[position].topk(top).values.tolist() if top else []
        assert [value for _, value in item.top] == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize("method", ["plain", "ngram:minimum=1", "draft-model", "token-recycling"])
@pytest.mark.parametrize("top", [0, 3])
def test_as_one_pass_gives_them(llm: LLM, method: str, top: int):
    plain = llm.generate([PROMPT], SamplingParams(max_tokens=6), "plain")[0]
    asked = SamplingParams(max_tokens=6, prompt_logprobs=top, n=2)
    for prompt in (PROMPT, PROMPT[:1], PROMPT[:2]):
        got = llm.generate([prompt], asked, method)[0]
        check(llm, got.prompt_logprobs, prompt, top)
    assert llm.generate([PROMPT], asked, method)[0].token_ids == plain.token_ids
    assert plain.prompt_logprobs == []


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_prompts_in_pieces(llm: LLM, rows: int):
    engine = Engine(llm.model, llm.tokenizer, llm.engine.end_ids, Limits(rows=rows))
    requests = engine.add(PROMPT, SamplingParams(max_tokens=3, prompt_logprobs=2, n=2))
    for _ in engine.run():
        pass
    for request in requests:
        check(llm, request.prompt_logprobs, PROMPT, 2)


def test_after_a_preemption(llm: LLM):
    """What was reported before stays, and nothing comes twice."""
    engine = Engine(llm.model, llm.tokenizer, llm.engine.end_ids, Limits(rows=5))
    (request,) = engine.add(PROMPT, SamplingParams(max_tokens=8, prompt_logprobs=1, ignore_eos=True))
    for step in range(30):
        if engine.busy:
            engine.step()
            if step in (1, 5) and engine.busy:
                engine._placement.preempt(request)
    assert request.finish_reason == "length" and len(request.output) == 8
    check(llm, request.prompt_logprobs, PROMPT, 1)


def test_what_is_remembered_is_read_again(tiny: Path):
    llm = LLM(tiny, dtype="float32", prefix_bytes="1MiB")
    for _ in range(2):
        got = llm.generate([PROMPT], SamplingParams(max_tokens=2, prompt_logprobs=0))[0]
        check(llm, got.prompt_logprobs, PROMPT, 0)


def test_embeddings_have_none(llm: LLM):
    prompt = [5, Embedded("zeros", torch.zeros(2, llm.model.config.hidden_size)), 9, 70]
    got = llm.generate([prompt], SamplingParams(max_tokens=2, prompt_logprobs=0))[0]
    assert got.prompt_token_ids == [5, EMBEDDED, EMBEDDED, 9, 70]
    assert [item is None for item in got.prompt_logprobs] == [True, True, True, False, False]


def test_specmemo_has_no_room_for_them(llm: LLM):
    with pytest.raises(UserError, match="has no room for prompt_logprobs"):
        llm.generate([PROMPT], SamplingParams(max_tokens=2, prompt_logprobs=0), "specmemo:drafter=ngram")
    assert llm.engine.cache.used_bytes == 0


@pytest.mark.parametrize("value", [-1, 101, 1.5, True, "5"])
def test_values_that_make_no_sense(value):
    with pytest.raises(UserError, match="prompt_logprobs must be a whole number"):
        SamplingParams(prompt_logprobs=value)
