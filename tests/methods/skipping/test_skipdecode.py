"""SkipDecode: its schedule, and that decoding step by step is one pass over prefixes, layer by layer."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

from hasten import LLM, SamplingParams, UserError
from hasten.engine import Engine, Target
from hasten.methods.skipping.skipdecode import Schedule, SkipDecode, SkipDecodeParameters
from hasten.model import OracleModel, load_model
from hasten.model.native.library import LIBRARY

BACKENDS = ["torch", *(["native"] if LIBRARY.exists() else [])]
LAYERS = 7
PROMPT = [number * 13 % 90 + 2 for number in range(11)]


@given(st.data())
def test_layers_only_fall_away(data: Any):
    layers = data.draw(st.integers(2, 40))
    warm = data.draw(st.integers(1, layers - 1))
    most = data.draw(st.integers(warm + 1, layers))
    least = data.draw(st.integers(warm + 1, most))
    length = data.draw(st.integers(1, 60))
    schedule = Schedule(layers, warm, most, least)
    sets = [schedule.chosen(schedule.count(index, length)) for index in range(length + 5)]
    counts = [len(each) for each in sets]
    assert counts[0] == most and (length == 1 or counts[length - 1 :] == [least] * 6)
    for earlier, later in pairwise(sets):
        assert set(later) <= set(earlier)
    for each in sets:
        assert list(each) == sorted(set(each))
        assert set(range(warm)) <= set(each) and layers - 1 in each
    assert sum(counts[:length]) / length == pytest.approx((most + least) / 2, abs=0.51 if length > 1 else layers)


def test_the_papers_numbers():
    assert Schedule(32, 1, 8, 8).chosen(8) == (0, *range(25, 32))
    for layers, share, expected in ((24, 0.5, (16, 8)), (32, 0.5, (21, 11)), (24, 1 / 4.8, (7, 3))):
        schedule = SkipDecodeParameters(share=share).schedule(layers)
        assert (schedule.most, schedule.least) == expected
    everything = SkipDecodeParameters().schedule(30)
    assert (everything.most, everything.least) == (30, 30)


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"share": 0.0}, "share must be above 0"),
        ({"share": 1.5}, "share must be above 0"),
        ({"most": -1}, "must not be negative"),
        ({"most": 2, "least": 3}, "most must not be below least"),
        ({"warm": 0}, "warm must be at least 1"),
    ],
)
def test_refused_parameters(parameters: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        SkipDecodeParameters(**parameters)


def test_refused_models(llm: LLM):
    with pytest.raises(UserError, match="needs a transformer"):
        SkipDecode(Target(OracleModel(lambda tokens: torch.zeros(8), 8)), SkipDecodeParameters())
    for wrong in (SkipDecodeParameters(most=5), SkipDecodeParameters(warm=2, least=2), SkipDecodeParameters(least=1)):
        with pytest.raises(UserError, match="since the model has 2"):
            SkipDecode(Target(llm.model), wrong)


def by_prefixes(reference: LlamaForCausalLM, tokens: list[int], prompt: int, counts: list[int], warm: int) -> Tensor:
    """Logits [answer's rows, vocabulary] in one pass: each layer over the rows that run it, which are a prefix."""
    inner = reference.model
    with torch.inference_mode():
        x = inner.embed_tokens(torch.tensor([tokens]))
        angles = inner.rotary_emb(x, torch.arange(len(tokens)).unsqueeze(0))
        for number, layer in enumerate(inner.layers):
            active = prompt + sum(number < warm or number >= LAYERS - (count - warm) for count in counts)
            mask = torch.full((active, active), -torch.inf).triu(1)[None, None]
            own = x[:, :active]
            turned = tuple(each[:, :active] for each in angles)
            own = own + layer.self_attn(layer.input_layernorm(own), turned, mask)[0]
            own = own + layer.mlp(layer.post_attention_layernorm(own))
            x = torch.cat([own, x[:, active:]], 1)
        return reference.lm_head(inner.norm(x))[0, prompt:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_by_step_is_one_pass_over_prefixes(make_checkpoint, backend):
    """Every token is the likeliest of that pass, and as likely, beside requests at other places of their answers."""
    checkpoint = make_checkpoint("llama", num_hidden_layers=LAYERS)
    model = load_model(checkpoint.folder, "float32", backend=backend)
    engine, drafter = Engine(model), SkipDecode(Target(model), SkipDecodeParameters(most=6, least=3, warm=2))
    asked = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=0)
    others = []
    for length in (3, 7):
        others += engine.add(PROMPT[:length], asked, drafter)
        engine.step()
    (request,) = engine.add(PROMPT, asked, drafter)
    for _ in engine.run():
        pass
    counts = [drafter.schedule.count(index, 20) for index in range(19)]
    assert counts[0] == 6 and counts[-1] == 3
    logits = by_prefixes(checkpoint.reference, request.tokens[:-1], len(PROMPT), counts, 2)
    assert request.output[1:] == logits.argmax(-1).tolist()
    expected = logits.log_softmax(-1).max(-1).values.tolist()
    assert [each.logprob for each in request.logprobs[1:]] == pytest.approx(expected, abs=1e-3)
    assert drafter.rows == 3 * 19 and drafter.computed == 3 * sum(counts)


def test_an_answer_may_be_longer_than_its_schedule(llm: LLM, make_checkpoint):
    model = load_model(make_checkpoint("llama", num_hidden_layers=LAYERS).folder, "float32")
    engine, drafter = Engine(model), SkipDecode(Target(model), SkipDecodeParameters(share=0.6, length=4))
    engine.add(PROMPT, SamplingParams(max_tokens=30, ignore_eos=True), drafter)
    for _ in engine.run():
        pass
    most, least = drafter.schedule.most, drafter.schedule.least
    assert drafter.computed == most + sum(drafter.schedule.count(each, 4) for each in (1, 2)) + 26 * least
