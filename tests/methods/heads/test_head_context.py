"""Heads with a context of their own: whatever was drafted, accepted or read again, it is that of the text alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten import LLM, SamplingParams
from hasten.cache import Cache
from hasten.engine import Draft, Engine, Request
from hasten.methods.heads import context
from hasten.methods.heads.context import ContextDrafter
from hasten.methods.heads.guesses import Guesses
from hasten.methods.heads.head import FINAL, backend_of
from hasten.model import Decoder, LayerConfig, ModelConfig, Rows, Span, Taps
from hasten.model.assembly import assemble
from hasten.model.native.library import LIBRARY
from hasten.model.weights import Piece, Pieces
from helpers import PeakBytes, Replay

HEADS, WIDTH, FFN = 2, 16, 32
PROMPTS = [list(range(5, 45)), [7, 9, 7, 9, 7], list(range(60, 90)), [3]]


def network(target: Decoder) -> Decoder:
    """A paired layer of random weights."""
    hidden, draw = target.config.hidden_size, torch.Generator().manual_seed(2)

    def piece(*shape: int) -> Piece:
        noise = shape[-1] ** -0.5 * torch.randn(shape, generator=draw)
        return Piece((noise + (len(shape) == 1)).to(target.dtype))

    layer = {
        "token_norm": piece(hidden),
        "mixer_norm": piece(hidden),
        "qkv": piece(3 * HEADS * WIDTH, 2 * hidden),
        "attention_out": piece(hidden, HEADS * WIDTH),
        "mlp_norm": piece(hidden),
        "gate_up": piece(2 * FFN, hidden),
        "down": piece(hidden, FFN),
    }
    frequencies = tuple(10.0 ** -(2 * n / WIDTH) for n in range(WIDTH // 2))
    shape = (LayerConfig.attention(HEADS, HEADS, WIDTH, FFN),)
    config = ModelConfig("head", target.config.vocab_size, hidden, 256, 1e-5, False, shape, frequencies)
    outside = Pieces(config, None, {"embedding": Piece(target.embedding), "norm": piece(hidden)}, {"head": target.head})
    return assemble(config, [outside, Pieces(config, 0, layer)], backend_of(target), target.cache_dtype)


class Reading(ContextDrafter):
    """Drafts what a script says, and keeps what its network made of each request's last row."""

    taps = (("input", 1), FINAL)

    def __init__(self, target: Decoder, script: Any) -> None:
        super().__init__(target, network(target), 0, Guesses(None))
        self.script, self.seen = script, []

    def enter(self, states: Tensor, tokens: Tensor) -> Tensor:
        first, last = states.chunk(2, -1)
        return first - 0.5 * last

    def draft(self, requests: Sequence[Request], states: Tensor, budgets: Sequence[int]) -> list[Draft]:
        self.seen += [(list(request.tokens), state.clone()) for request, state in zip(requests, states, strict=True)]
        for request in requests:
            # Pending rows of a draft that vanish with the next pass.
            beside = torch.tensor([4, 5])
            span = self.span(request, 0, 2, torch.tensor([[True, False], [False, True]]))
            self.advance(states[:2].expand(2, -1), beside, [9, 9], [span])
        return [self.script.propose(request, 8) for request in requests]

    def alone(self, target: Decoder, tokens: list[int]) -> Tensor:
        """What it must make of the last row of a text."""
        taps = Taps(self.taps)
        fresh = Cache(target.config.layers, target.cache_dtype, target.device).sequence()
        target.forward(Rows.of(fresh, tokens, 0), None, taps)
        count = len(tokens) - 1
        states = torch.cat([taps[tap][:count] for tap in self.taps], -1)
        own = Cache(self.network.config.layers, self.network.cache_dtype, self.network.device).sequence()
        beside, output = torch.tensor(tokens[1:]), Taps([self.output])
        rows = Rows(torch.full((count,), -1), torch.arange(count), [Span(own, 0, count)], self.enter(states, beside))
        rows.beside = beside
        self.network.forward(rows, [], output)
        return output[self.output][-1]


def scripts(plain: Any) -> dict[str, Replay]:
    from helpers import Bushy

    return {"chains": Replay(plain, 3, [5, 9]), "trees": Bushy(plain, 4)}


@pytest.mark.parametrize("backend", ["torch", *(["native"] if LIBRARY.exists() else [])])
@pytest.mark.parametrize("script", ["chains", "trees"])
@pytest.mark.parametrize("limits", ["roomy", "tight"])
def test_it_is_that_of_the_text_alone(
    tiny: Path, backend: str, script: str, limits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "READING", 17)
    llm = LLM(tiny, dtype="float32", backend=backend)
    asked = SamplingParams(max_tokens=24, ignore_eos=True)
    plain = llm.generate(PROMPTS, asked, "plain")
    room = llm.engine.cache.sequence_bytes(100)
    engine = Engine(llm.model, llm.tokenizer, cache_bytes=None if limits == "roomy" else int(1.7 * room))
    drafter = Reading(llm.model, scripts(plain)[script])
    requests = [engine.add(prompt, asked, drafter)[0] for prompt in PROMPTS]
    list(engine.run())
    assert [request.output for request in requests] == [each.token_ids for each in plain]
    assert len(drafter.seen) > 12
    for tokens, state in drafter.seen:
        expected = drafter.alone(llm.model, tokens)
        if backend == "native":
            assert torch.equal(state, expected)
        else:
            torch.testing.assert_close(state, expected, atol=1e-4, rtol=1e-4)
    assert drafter.memory_bytes == 0


def test_several_choices_share_a_prompt_and_nothing_else(tiny: Path) -> None:
    llm = LLM(tiny, dtype="float32")
    asked = SamplingParams(max_tokens=12, n=3, temperature=1.0, seed=4, ignore_eos=True)
    plain = llm.generate([PROMPTS[0]], asked, "plain")
    drafter = Reading(llm.model, Replay(plain, 2, [5]))
    got = llm.generate([PROMPTS[0]], asked, drafter)
    assert [choice.token_ids for choice in got[0].choices] == [choice.token_ids for choice in plain[0].choices]
    assert all(torch.allclose(state, drafter.alone(llm.model, text), atol=1e-4) for text, state in drafter.seen)


def test_what_is_read_takes_no_more_than_is_said(tiny: Path) -> None:
    llm = LLM(tiny, dtype="float32", backend="torch")
    asked = SamplingParams(max_tokens=6, ignore_eos=True)
    drafter = Reading(llm.model, Replay(llm.generate(PROMPTS[:1], asked, "plain"), 3))
    [request] = llm.engine.add(PROMPTS[0], asked, drafter)
    while not request.output:
        llm.engine.step()
    said, grown, before = drafter.scratch_bytes([request], 4), drafter.growth_bytes([request]), drafter.memory_bytes
    with PeakBytes() as peak:
        drafter.states([request])
    assert drafter.memory_bytes <= before + grown
    assert peak.most <= said + grown
    llm.engine.abort(request)
