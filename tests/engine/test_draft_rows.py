"""Drafts of many requests that do not fit into one pass are verified in turn, whole, and none is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hasten import LLM, SamplingParams
from hasten.engine import Engine, Limits
from hasten.model import Decoder, Rows
from helpers import Replay

WORDS = ["the cat and", "when another morning", "the moon sing in", "stars and dances", "on water", "reads the garden"]


@pytest.mark.parametrize("draft_rows", [1, 7, 13, 20, 1000])
@pytest.mark.parametrize("acceptance", ["match", "max"])
def test_no_pass_has_more(llm: LLM, monkeypatch: pytest.MonkeyPatch, draft_rows: int, acceptance: Any) -> None:
    asked = [
        SamplingParams(
            max_tokens=24, ignore_eos=True, temperature=0.8 * (number % 2), seed=number, acceptance=acceptance
        )
        for number in range(len(WORDS))
    ]
    prompts = [llm.encode(word) for word in WORDS]
    known = llm.generate(prompts, asked, "plain")
    alone = [
        llm.generate([prompt], own, Replay([each], 6))[0]
        for prompt, own, each in zip(prompts, asked, known, strict=True)
    ]
    passes: list[list[int]] = []
    forward = Decoder.forward

    def watched(self: Decoder, rows: Rows, *arguments: Any) -> torch.Tensor:
        passes.append([span.stop - span.start - 1 for span in rows.spans])
        return forward(self, rows, *arguments)

    monkeypatch.setattr(Decoder, "forward", watched)
    engine = Engine(llm.model, llm.tokenizer, llm.engine.end_ids, Limits(draft_rows=draft_rows))
    drafter = Replay(known, 6)
    requests = [engine.add(prompt, own, drafter)[0] for prompt, own in zip(prompts, asked, strict=True)]
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
    for drafts in passes[1:]:
        assert sum(drafts) <= max(draft_rows, 6)
    for request, expected in zip(requests, alone, strict=True):
        assert request.output == expected.token_ids
        assert request.statistics.accepted_per_step == expected.choices[0].statistics.accepted_per_step
    # Nobody waits longer than it takes to have everybody's drafts verified once.
    each = max(generation.choices[0].steps for generation in alone)
    assert steps <= 2 + each * -(-6 * len(WORDS) // max(draft_rows // 6 * 6, 6))
