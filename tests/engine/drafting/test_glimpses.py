"""Drafters look into a pass: they are given what enters a layer, of the rows that are verified, while it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten import LLM, SamplingParams
from hasten.cache import Cache
from hasten.engine import Draft
from hasten.model import Decoder, Rows, Taps, load_model
from hasten.model.native.library import LIBRARY
from helpers import Scripted

BACKENDS = ["torch", *(["native"] if LIBRARY.exists() else [])]
PROMPTS = [[5, 6, 7, 8], list(range(20, 60)), [9]]


class Looking(Scripted):
    early = 1

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(lambda request: Draft.chain([3, 4, 5][: len(request.tokens) % 3]))
        self.error, self.seen_early = error, []

    def glimpse(self, requests, drafts, states):
        if self.error is not None:
            raise self.error
        for request, draft, rows in zip(requests, drafts, states, strict=True):
            self.seen_early.append((list(request.tokens), list(draft.tokens), rows.clone()))


@pytest.fixture(params=BACKENDS)
def llm(request: pytest.FixtureRequest, tiny: Path) -> LLM:
    return LLM(tiny, dtype="float32", backend=request.param)


def test_what_enters_the_layer(llm):
    """The rows of root and draft, as a pass over all of the text computes them; the tokens are plain decoding's."""
    asked, drafter = SamplingParams(max_tokens=8, ignore_eos=True), Looking()
    expected = llm.generate(PROMPTS, asked, "plain")
    requests = [llm.engine.add(prompt, asked, drafter)[0] for prompt in PROMPTS]
    list(llm.engine.run())
    assert [request.output for request in requests] == [each.token_ids for each in expected]
    assert sum(bool(draft) for _, draft, _ in drafter.seen_early) > 5
    for tokens, draft, rows in drafter.seen_early[::3]:
        taps = Taps([("input", 1)])
        sequence = Cache(llm.model.config.layers, llm.model.cache_dtype, llm.model.device).sequence()
        llm.model.forward(Rows.of(sequence, tokens + draft, 0), None, taps)
        torch.testing.assert_close(rows, taps["input", 1][-1 - len(draft) :], atol=1e-4, rtol=1e-3)


def test_it_is_under_way(llm, monkeypatch):
    """What the model computes behind the layer comes after the look."""
    done: list[str] = []
    if llm.model.backend.name == "native":
        from hasten.model.native import backend

        loaded = backend.library()
        monkeypatch.setattr(backend, "library", lambda: _Counted(loaded, done))
    else:
        own = Decoder.logits
        monkeypatch.setattr(Decoder, "logits", lambda *arguments: done.append("end") or own(*arguments))
    drafter = Looking()
    drafter.glimpse = lambda requests, drafts, states: done.append("look")
    llm.engine.add(PROMPTS[0], SamplingParams(max_tokens=3, ignore_eos=True), drafter)
    list(llm.engine.run())
    assert done[-2:] == ["look", "end"]


class _Counted:
    """The native library, whose passes that end are noted."""

    def __init__(self, loaded, done) -> None:
        self._loaded, self._done = loaded, done

    def __getattr__(self, name):
        return getattr(self._loaded, name)

    def hasten_forward(self, model, team, batch, layer):
        reached = self._loaded.hasten_forward(model, team, batch, layer)
        if reached == 2:
            self._done.append("end")
        return reached


def test_who_fails_as_it_looks_fails_alone(llm):
    asked = SamplingParams(max_tokens=8, ignore_eos=True)
    failing, fine = Looking(ValueError("no")), Looking()
    one, other = (llm.engine.add(PROMPTS[0], asked, drafter)[0] for drafter in (failing, fine))
    while llm.engine.busy:
        llm.engine.step()
    assert isinstance(one.error, ValueError) and one.finish_reason == "error"
    assert other.output == llm.generate([PROMPTS[0]], asked, "plain")[0].token_ids


@pytest.mark.skipif(not LIBRARY.exists(), reason="needs the native step")
def test_a_pause_changes_no_bit(make_checkpoint):
    """Several pauses in one pass of a deeper model."""
    model = load_model(make_checkpoint("llama", num_hidden_layers=5).folder, "float32", "cpu", "native")
    sites = [("input", 2), ("input", 4), ("output", 1)]
    results, heard = [], []
    for listening in (False, True):
        taps = Taps(sites)
        if listening:
            taps.listeners = {site: lambda state, site=site: heard.append((site, state.clone())) for site in sites}
        sequence = Cache(model.config.layers, model.cache_dtype, model.device).sequence()
        logits = model.forward(Rows.of(sequence, list(range(3, 40)), 0), [5, 36], taps)
        results.append((logits, [taps[site] for site in sites]))
    assert [site for site, _ in heard] == sites
    assert all(torch.equal(state, taps[site]) for site, state in heard)
    assert torch.equal(results[0][0], results[1][0])
    assert all(map(torch.equal, results[0][1], results[1][1]))
