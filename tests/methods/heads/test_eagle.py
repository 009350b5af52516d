"""EAGLE: each node of its trees has the probability that its path has by itself, whichever head it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle_heads import random_head

from hasten import LLM, SamplingParams
from hasten.engine import Draft, Request, Target
from hasten.engine.creation import create
from hasten.errors import UserError
from hasten.methods.heads.eagle import Eagle
from hasten.methods.heads.eagle_format import layer_fields
from hasten.model import Rows, Span, Taps
from hasten.model.layers import Attention, GatedMLP
from hasten.model.native.blocks import BlockLinear
from helpers import PeakBytes

PROMPT = [5, 17, 40, 5, 17, 9]
ASKED = SamplingParams(max_tokens=10, ignore_eos=True)
HEADS: dict[str, dict[str, Any]] = {
    "eagle-1": {"version": 1},
    "eagle-1 of few words": {"version": 1, "words": torch.arange(3, 150, 4)},
    "eagle-3": {"version": 3, "own": True, "words": torch.arange(2, 150, 3)},
    "eagle-3 with the target's head": {"version": 3},
    "eagle-3 with a normed residual": {"version": 3, "normed": True},
    "eagle-3 in blocks": {"version": 3, "own": True, "store": "q4_1"},
}


@pytest.fixture(params=HEADS)
def drafter(request: pytest.FixtureRequest, llm: LLM, tmp_path: Path) -> Eagle:
    config = llm.model.config
    random_head(config, **HEADS[request.param]).save(tmp_path / "head", layer_fields(config))
    return made(llm, f"eagle:head={tmp_path / 'head'},nodes=12,depth=3,beam=3,least=0,sized=false")


def made(llm: LLM, spec: str) -> Eagle:
    drafter = create(spec, Target(llm.model, llm.tokenizer, str(llm.folder)))
    assert isinstance(drafter, Eagle)
    return drafter


def drafted(llm: LLM, drafter: Eagle) -> tuple[Request, Draft]:
    """A request behind its first step, and its draft."""
    [request] = llm.engine.add(PROMPT, ASKED, drafter)
    llm.engine.step()
    return request, drafter.propose(request, 64)


def chances(llm: LLM, drafter: Eagle, tokens: list[int], path: list[int]) -> list[float]:
    """Of each token of a path: one row after the other, in a cache of its own."""
    eagle, taps = drafter.eagle, Taps(drafter.taps)
    read = llm.engine.cache.sequence()
    llm.model.forward(Rows.of(read, tokens, 0), [], taps)
    read.release()
    states = torch.cat([taps[tap][:-1] for tap in drafter.taps], -1)
    own, found = drafter.cache.sequence(), []
    entering, beside, place = eagle.enter(states, torch.tensor(tokens[1:])), tokens[1:], 0
    for token in path:
        count, output = len(beside), Taps([drafter.output])
        rows = Rows(torch.full((count,), -1), torch.arange(place, place + count), [Span(own, 0, count)], entering)
        rows.beside = torch.tensor(beside)
        logits = eagle.decoder.forward(rows, [count - 1], output)[0]
        own.commit(count)
        words = torch.arange(150) if eagle.words is None else eagle.words
        found.append(logits.softmax(-1)[words.tolist().index(token)].item())
        place, beside = place + count, [token]
        entering = eagle.enter_again(output[drafter.output][-1:], torch.tensor(beside))
    own.release()
    return found


def test_a_nodes_estimate_is_that_of_its_path(llm: LLM, drafter: Eagle) -> None:
    request, draft = drafted(llm, drafter)
    assert len(draft) == 12 and max(draft.depths()) > 1
    assert len({(parent, token) for parent, token in zip(draft.parents, draft.tokens, strict=True)}) == 12
    for node, estimate in enumerate(draft.estimates):
        path = [draft.tokens[each] for each in draft.path(node)]
        expected = torch.tensor(chances(llm, drafter, request.tokens, path)).prod().item()
        assert estimate == pytest.approx(expected, rel=1e-3)
    # Asked once more, it says the same.
    assert drafter.propose(request, 64).tokens == draft.tokens
    llm.engine.abort(request)


@pytest.mark.parametrize("shape", ["nodes=20,depth=4,beam=3", "nodes=6,depth=5,beam=2", "nodes=9,tree=chain,depth=6"])
def test_one_native_call_grows_the_trees_that_are_composed(llm: LLM, tmp_path: Path, shape: str) -> None:
    config = llm.model.config
    for number, head in enumerate(HEADS.values()):
        folder = tmp_path / str(number)
        random_head(config, **head).save(folder, layer_fields(config))
        for least in (0, 0.3):
            drafter = made(llm, f"eagle:head={folder},{shape},least={least},sized=false")
            growth = drafter._growth
            asked = [ASKED, replace(ASKED, stop_token_ids=[*range(0, 150, 2)]), replace(ASKED, max_tokens=3)]
            prompts = [PROMPT, [*range(30, 70)], [7, 8]]
            requests = [llm.engine.add(prompt, how, drafter)[0] for prompt, how in zip(prompts, asked, strict=True)]
            llm.engine.step()
            native = drafter.propose_all(requests, [64, 5, 64])
            drafter._growth = None
            composed = drafter.propose_all(requests, [64, 5, 64])
            assert growth is not None
            for one, other in zip(native, composed, strict=True):
                assert (one.tokens, one.parents) == (other.tokens, other.parents)
                assert one.estimates == pytest.approx(other.estimates, rel=1e-3)
            for each in requests:
                llm.engine.abort(each)


def test_it_gives_plain_decodings_tokens(llm: LLM, drafter: Eagle) -> None:
    prompts = [PROMPT, list(range(30, 70)), [7]]
    for temperature in (0.0, 0.8):
        asked = SamplingParams(max_tokens=16, temperature=temperature, seed=5, ignore_eos=True)
        plain = llm.generate(prompts, asked, "plain")
        assert [each.token_ids for each in llm.generate(prompts, asked, drafter)] == [each.token_ids for each in plain]
    assert drafter.memory_bytes == drafter.eagle.own_bytes


@pytest.mark.parametrize("store", ["q8_0", "q4_1"])
@pytest.mark.parametrize("asked", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"weights": "int4"}])
def test_blocks_run_as_they_are_stored(store: str, asked: dict[str, str], tmp_path: Path) -> None:
    """Whatever the target's own weights are."""
    llm = LLM("tiny", **asked)  # type: ignore[arg-type]
    config = llm.model.config
    for version in (1, 3):
        random_head(config, version, own=version == 3, store=store).save(tmp_path / "head", layer_fields(config))
        network = made(llm, f"eagle:head={tmp_path / 'head'}").eagle
        mixer, mlp = network.decoder.layers[0].mixer, network.decoder.layers[0].mlp
        assert isinstance(mixer, Attention) and isinstance(mlp, GatedMLP)
        own = [network.fusion, mixer.qkv, mixer.out, mlp.gate_up, mlp.down]
        own += [network.decoder.head] if version == 3 else []
        for linear in own:
            assert isinstance(linear, BlockLinear) and linear.format == store.upper()


def test_few_nodes_are_the_likeliest_of_many(llm: LLM) -> None:
    many = drafted(llm, made(llm, "eagle:nodes=40,depth=4,beam=4,least=0,sized=false"))[1]
    few = drafted(llm, made(llm, "eagle:nodes=7,depth=4,beam=4,least=0,sized=false"))[1]
    assert sorted(few.estimates) == pytest.approx(sorted(many.estimates)[-7:])
    chain = drafted(llm, made(llm, "eagle:tree=chain,depth=4,least=0,sized=false"))[1]
    assert chain.is_chain and len(chain) == 4
    sure = drafted(llm, made(llm, "eagle:depth=4,least=1,sized=false"))[1]
    assert set(sure.depths()) == {1}


def test_drafting_takes_no_more_than_is_said(llm: LLM, drafter: Eagle) -> None:
    composed = LLM(llm.folder, dtype="float32", backend="torch")
    own = Eagle(composed.engine.target, drafter.parameters)
    [request] = composed.engine.add(PROMPT, ASKED, own)
    composed.engine.step()
    said = own.scratch_bytes([request], 12) + own.growth_bytes([request])
    with PeakBytes() as peak:
        own.propose(request, 12)
    assert peak.most <= said


def test_what_cannot_be_asked(llm: LLM) -> None:
    for spec, told in (
        ("eagle:nodes=0", "nodes must be between 1 and 64"),
        ("eagle:beam=17", "beam must be between 1 and 16"),
        ("eagle:least=2", "least must be between"),
        ("eagle:tree=round", "dynamic or chain"),
        ("eagle:site=middle", "input or output"),
    ):
        with pytest.raises(UserError, match=told):
            made(llm, spec)
