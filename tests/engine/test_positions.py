"""A request knows what the model has read; how many slots its cache has says nothing of positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hasten import LLM, SamplingParams
from hasten.engine import Draft
from hasten.model import Decoder, Rows
from helpers import Scripted, make_model, make_tokenizer

LONG = SamplingParams(max_tokens=30, ignore_eos=True)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """Tokens and positions of each pass."""
    passes: list[tuple[list[int], list[int]]] = []
    forward = Decoder.forward

    def watched(self: Decoder, rows: Rows, *arguments: Any) -> torch.Tensor:
        passes.append((rows.tokens.tolist(), rows.positions.tolist()))
        return forward(self, rows, *arguments)

    monkeypatch.setattr(Decoder, "forward", watched)
    return passes


def test_slots_may_be_evicted_while_a_request_decodes(llm: LLM, seen: list[tuple[list[int], list[int]]]) -> None:
    engine = llm.engine
    drafter = Scripted(lambda request: Draft.chain([5, 7]))
    (request,) = engine.add(llm.encode("the cat and the moon"), LONG, drafter)
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
        if steps in (2, 5) and request.finish_reason is None:
            request.sequence.evict([1, 2, 4])
            assert request.sequence.length == request.read - (3 if steps == 2 else 6)
    assert len(request.output) == 30
    for tokens, positions in seen[1:]:
        root = positions[0]
        assert positions == list(range(root, root + len(tokens)))
        # The root is the token that stands there, however few slots are left of what is before it.
        assert tokens[0] == request.tokens[root]


def test_drafts_of_skipped_layers_stand_where_their_tokens_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(num_hidden_layers=4).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    llm = LLM(tmp_path, dtype="float32")
    starts: list[tuple[list[int], int]] = []
    start = Decoder.start

    def watched(self: Decoder, rows: Rows, *arguments: Any) -> Any:
        starts.append((rows.positions.tolist(), request.read))
        return start(self, rows, *arguments)

    (request,) = llm.engine.add(llm.encode("the cat and the moon"), LONG, "swift:max_trials=0,width=1,threshold=0")
    llm.engine.step()
    llm.engine.step()
    request.sequence.evict([0, 3])
    monkeypatch.setattr(Decoder, "start", watched)
    llm.engine.step()
    llm.engine.abort(request)
    drafted = [positions for positions, _ in starts if len(positions) == 1]
    assert drafted
    assert drafted == [[starts[0][1] + level] for level in range(len(drafted))]


def test_the_first_verification_shows_taps(llm: LLM) -> None:
    """The row that gave the first token is the prompt's last one."""
    sites = (("output", 1), ("final_norm", 0))
    drafter = Scripted(lambda request: Draft.chain([5]))
    drafter.taps = sites  # type: ignore[assignment]
    read: list[Any] = []
    drafter.observe_prompt = lambda request, start, taps: read.append(taps)  # type: ignore[method-assign]
    prompt = llm.encode("the cat and the moon")
    requests = llm.engine.add(
        prompt, SamplingParams(max_tokens=4, n=2, temperature=1, seed=1, ignore_eos=True), drafter
    )
    for _ in llm.engine.run():
        pass
    for request in requests:
        first, second, *_ = drafter.seen[request.id]
        for site in sites:
            assert first.taps[site].shape == (1, 48)
            assert torch.equal(first.taps[site][0], read[0][site][len(prompt) - 1])
            assert second.taps[site].shape == (2, 48)
