"""What drafters say of their memory: it grows by no more than they announced, and what requests held is given back."""

from __future__ import annotations

import pytest
from cases import PROMPTS, SPECS, params

from hasten.engine import Drafter, Engine


class Watched(Drafter):
    """Passes everything on, and compares the drafter's growth with its announcement."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.taps, self.rations = drafter, drafter.taps, drafter.rations
        self.checks = 0

    def _watch(self, act, requests, rows=0):
        announced, before = self.drafter.growth_bytes(requests, rows), self.drafter.memory_bytes
        result = act()
        assert self.drafter.memory_bytes <= before + announced
        self.checks += 1
        return result

    def headroom(self, request):
        return self.drafter.headroom(request)

    def admits(self, request):
        return self.drafter.admits(request)

    def begin(self, request):
        self._watch(lambda: self.drafter.begin(request), [request])

    def propose_all(self, requests, budgets):
        return self._watch(lambda: self.drafter.propose_all(requests, budgets), requests)

    def observe_prompt(self, request, start, taps):
        self.drafter.observe_prompt(request, start, taps)

    def observe(self, request, seen):
        self._watch(lambda: self.drafter.observe(request, seen), [request], len(seen.draft) + 1)

    def end(self, request):
        self.drafter.end(request)


@pytest.mark.parametrize("spec", SPECS)
def test_growth_is_announced(llm, spec):
    engine = Engine(llm.model, llm.tokenizer, llm.engine.end_ids, folder=llm.engine.target.folder)
    watched = Watched(engine.drafter(spec)[1])
    for turn in range(2):
        for number in range(turn, len(PROMPTS), 5):
            engine.add(PROMPTS[number], params(number, "greedy"), watched)
        list(engine.run())
    assert watched.checks > 20 or spec == "plain"
