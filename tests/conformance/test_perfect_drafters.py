"""A drafter that is right saves steps; one that is right on a late branch exercises the cache's gather, too."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from cases import PROMPTS

from hasten import SamplingParams
from hasten.engine import Engine
from hasten.model import Rows
from helpers import Bushy, Replay, same

PROMPT = PROMPTS[16]
LONG = 170


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("length", [1, 2, 4, 7])
@pytest.mark.parametrize("kind", [Replay, Bushy])
def test_steps_saved(llm, kind, length, temperature):
    asked = SamplingParams(max_tokens=LONG, temperature=temperature, seed=8, ignore_eos=True, n=2, logprobs=2)
    expected = llm.generate([PROMPT], asked, "plain")
    got = llm.generate([PROMPT], asked, kind(expected, length))
    for mine, theirs in zip(got[0].choices, expected[0].choices, strict=True):
        same(mine, theirs)
        assert theirs.steps == LONG
        # The prompt's own step gives the first token; each further one `length` tokens and the target's own.
        assert mine.steps == 1 + ceil((LONG - 1) / (length + 1))
        assert mine.tokens_per_step == pytest.approx(LONG / mine.steps)
        assert set(mine.statistics.accepted_per_step[1:-1]) == {length}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kind", [Replay, Bushy])
def test_cache_equals_a_fresh_prefill_after_every_step(llm, kind, temperature):
    asked = SamplingParams(max_tokens=60, temperature=temperature, seed=2, ignore_eos=True)
    known = llm.generate([PROMPT], asked, "plain")
    engine = Engine(llm.model, llm.tokenizer)
    (request,) = engine.add(PROMPT, asked, kind(known, 5))
    compared = 0
    while engine.busy:
        engine.step()
        if request.finish_reason is not None:
            break
        tokens = request.tokens
        assert request.sequence.length == len(tokens) - 1
        grown, fresh = request.sequence.fork(), engine.cache.sequence()
        last = llm.model.forward(Rows.of(grown, tokens[-1:], len(tokens) - 1))[0]
        whole = llm.model.forward(Rows.of(fresh, tokens, 0), [len(tokens) - 1])[0]
        torch.testing.assert_close(last, whole, atol=1e-5, rtol=1e-5)
        grown.release()
        fresh.release()
        compared += 1
    assert request.output == known[0].token_ids
    assert compared == ceil(59 / 6)
    assert engine.cache.used_bytes == 0


def test_tree_rows_are_what_chains_give(llm):
    """Each node's logits equal those of its path alone."""
    prompt = PROMPTS[20]
    known = llm.generate([prompt], SamplingParams(max_tokens=12), "plain")
    cache = llm.engine.cache
    engine = Engine(llm.model, llm.tokenizer)
    drafter = Bushy(known, 4)
    seen = []
    drafter.observe = lambda request, observation: seen.append((list(request.tokens), observation))
    engine.add(prompt, SamplingParams(max_tokens=12), drafter)
    for _ in engine.run():
        pass
    before, observation = seen[1]
    context = before[: len(before) - len(observation.tokens)]
    for node in range(len(observation.draft)):
        path = [observation.draft.tokens[step] for step in observation.draft.path(node)]
        alone = cache.sequence()
        logits = llm.model.forward(Rows.of(alone, context + path, 0), [len(context + path) - 1])[0]
        torch.testing.assert_close(observation.logits[node + 1], logits, atol=1e-5, rtol=1e-5)
        alone.release()
