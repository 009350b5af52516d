"""Hidden states that drafters ask for are those of the tokens that were kept, for every token, in every batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import KINDS, PROMPTS, params

from hasten import LLM
from hasten.cache import Cache
from hasten.engine import Observation, Request
from hasten.model import Rows, Taps
from hasten.model.native.library import LIBRARY
from helpers import Replay

SITES = (("input", 1), ("attention_output", 0), ("mlp_input", 1), ("output", 1), ("final_norm", 0))


class Tapping(Replay):
    """Knows the answers, and keeps the states of every token that the model has read and kept."""

    taps = SITES

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.kept: dict[int, list[dict[Any, torch.Tensor]]] = {}

    def observe_prompt(self, request: Request, start: int, taps: Taps | None) -> None:
        assert taps is not None
        rows = self.kept.setdefault(request.id, [])
        assert start == len(rows)
        rows += [{site: taps[site][row] for site in SITES} for row in range(len(taps[SITES[0]]))]

    def observe(self, request: Request, seen: Observation) -> None:
        rows = self.kept[request.id]
        fresh = [{site: seen.taps[site][row] for site in SITES} for row in (0, *(node + 1 for node in seen.path))]
        if len(rows) == request.prompt_length and len(fresh) == 1 and not seen.draft:
            # The first verification shows the prompt's last row once more.
            again = rows.pop()
            if len(seen.tokens) == len(request.output):
                assert all(torch.equal(again[site], fresh[0][site]) for site in SITES)
            else:
                rows.append(again)
        rows += fresh


@pytest.mark.parametrize("backend", ["torch", *(["native"] if LIBRARY.exists() else [])])
def test_states_of_all_kept_tokens(tiny: Path, backend: str) -> None:
    llm = LLM(tiny, dtype="float32", backend=backend)
    numbers = range(3, len(PROMPTS), 14)
    kinds = list(KINDS)
    asked = [params(number, kinds[index % len(kinds)], ignore_eos=True) for index, number in enumerate(numbers)]
    prompts = [PROMPTS[number] for number in numbers]
    drafter = Tapping(llm.generate(prompts, asked, "plain"), length=3, beyond=[5, 9])
    requests = [llm.engine.add(prompt, own, drafter)[0] for prompt, own in zip(prompts, asked, strict=True)]
    for _ in llm.engine.run():
        pass
    for request in requests:
        kept = drafter.kept[request.id]
        # The step that ends a request is not shown.
        assert request.prompt_length < len(kept) < len(request.tokens)
        taps = Taps(SITES)
        sequence = Cache(llm.model.config.layers, llm.model.cache_dtype, llm.model.device).sequence()
        llm.model.forward(Rows.of(sequence, request.tokens[: len(kept)], 0), None, taps)
        for site in SITES:
            got = torch.stack([row[site] for row in kept])
            if backend == "native":
                assert torch.equal(got, taps[site])
            else:
                torch.testing.assert_close(got, taps[site], atol=1e-4, rtol=1e-3)
