"""Drafting with a smaller model: refusals, chains and trees, its cache, and drafting for a batch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hasten import LLM, SamplingParams, UserError
from hasten.engine import ROOT, Engine, Target
from hasten.methods.drafters.draft_model import DraftModel, DraftModelParameters
from hasten.model import OracleModel, Rows
from hasten.model.native.library import LIBRARY
from helpers import CONTEXT, VOCABULARY, make_model, same

PROMPTS = [[number * 13 % 140 + 2 for number in range(1, length)] for length in (2, 40, 7, 23, 61, 12)]


def recorded(llm, spec: str, prompts=PROMPTS, alone: bool = False, **settings):
    """All drafts per prompt, the outputs, and the tokens before each draft; one engine for all, or one for each."""
    asked = SamplingParams(**{"max_tokens": 16, "seed": 3, "ignore_eos": True, **settings})
    drafts, contexts, outputs = {}, {}, []
    for group in [[prompt] for prompt in prompts] if alone else [prompts]:
        engine = Engine(llm.model, llm.tokenizer, folder=str(llm.folder))
        drafter = engine.drafter(spec)[1]

        def note(requests, budgets, propose_all=drafter.propose_all):
            proposed = propose_all(requests, budgets)
            for request, draft in zip(requests, proposed, strict=True):
                prompt = tuple(request.tokens[: request.prompt_length])
                drafts.setdefault(prompt, []).append(draft)
                contexts.setdefault(prompt, []).append(list(request.tokens))
            return proposed

        drafter.propose_all = note
        requests = [engine.add(prompt, asked, spec)[0] for prompt in group]
        for _ in engine.run():
            pass
        outputs += [request.output for request in requests]
        assert drafter.cache.used_bytes == 0
    return drafts, outputs, contexts


# Refusals


@pytest.fixture
def variant(tiny: Path, tmp_path: Path):
    """variant(**settings): the drafter's folder, re-made with another shape."""

    def make(**settings) -> Path:
        folder = tmp_path / "variant"
        shutil.copytree(f"{tiny}-draft", folder)
        if settings:
            make_model(**settings).save_pretrained(folder)
        return folder

    return make


def test_no_drafter_beside_the_target(tiny, tmp_path):
    lonely = tmp_path / "lonely"
    shutil.copytree(tiny, lonely)
    with pytest.raises(UserError, match="lonely-draft"):
        LLM(lonely, method="draft-model")
    # Nor is what a training has left that is not over.
    (tmp_path / "lonely-draft").mkdir()
    (tmp_path / "lonely-draft" / "training.pt").touch()
    with pytest.raises(UserError, match=r"finds no drafter at .*lonely-draft"):
        LLM(lonely, method="draft-model")
    assert LLM(lonely, method="auto").generate(["the"], SamplingParams(max_tokens=2))
    with pytest.raises(UserError, match="no checkpoint at 'nowhere'"):
        LLM(tiny, method="draft-model:model=nowhere")


def test_target_without_a_folder():
    with pytest.raises(UserError, match="draft-model needs a model: use draft-model:model=FOLDER"):
        DraftModel(Target(OracleModel(lambda history: None, 5)), DraftModelParameters())


def test_another_tokenizer(tiny, variant):
    folder = variant()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="has another tokenizer than the target"):
        LLM(tiny, method=f"draft-model:model={folder}")


def test_smaller_vocabulary(tiny, variant):
    """Not all tokens of the tokenizer have a row."""
    folder = variant(vocab_size=VOCABULARY - 1)
    with pytest.raises(UserError, match=rf"smaller vocabulary than the target \({VOCABULARY - 1} < {VOCABULARY}\)"):
        LLM(tiny, method=f"draft-model:model={folder}")


def test_larger_vocabulary_is_fine(llm, variant):
    """Padded embedding tables are common; tokens that the target does not have are never proposed."""
    folder = variant(vocab_size=VOCABULARY + 40)
    asked = [SamplingParams(max_tokens=16, seed=2, temperature=temperature) for temperature in (0.0, 1.5)]
    for parameters in asked:
        expected = llm.generate(PROMPTS, parameters, "plain")
        for spec in (f"draft-model:model={folder}", f"draft-model:model={folder},width=3"):
            for mine, theirs in zip(llm.generate(PROMPTS, parameters, spec), expected, strict=True):
                same(mine.choices[0], theirs.choices[0])


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_target_that_is_padded_further(tiny, tmp_path, backend):
    """Both have the same tokenizer; the target even says tokens that the drafter has no rows for."""
    folder = shutil.copytree(tiny, tmp_path / "padded")
    make_model(vocab_size=VOCABULARY + 40).save_pretrained(folder)
    padded = LLM(folder, dtype="float32", backend=backend)
    for settings in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 20}, {"repetition_penalty": 1.3}):
        asked = SamplingParams(max_tokens=24, seed=2, ignore_eos=True, **settings)
        expected = padded.generate([*PROMPTS, [VOCABULARY + 3, 5]], asked, "plain")
        assert any(token >= VOCABULARY for each in expected for token in each.token_ids)
        for spec in ("draft-model", "draft-model:width=3,length=3", "dyspec:nodes=12", "vocabtrim:tokens=90"):
            name, _, rest = spec.partition(":")
            method = f"{name}:model={tiny}-draft" + f",{rest}" * bool(rest)
            got = padded.generate([*PROMPTS, [VOCABULARY + 3, 5]], asked, method)
            for mine, theirs in zip(got, expected, strict=True):
                same(mine.choices[0], theirs.choices[0])
            # With the rejection rules the tokens are others.
            padded.generate(PROMPTS[:2], replace(asked, acceptance="max" if asked.temperature else "match"), method)
    assert padded.engine.cache.used_bytes == 0


def test_drafter_with_a_shorter_context(llm, variant):
    """It proposes as long as it can, and plain decoding goes on from there."""
    folder = variant(max_position_embeddings=32, noise=0.02)
    asked = SamplingParams(max_tokens=40, ignore_eos=True)
    prompts = [PROMPTS[2], PROMPTS[3], [5] * 31, [5] * 32, [5] * 33]
    expected = llm.generate(prompts, asked, "plain")
    got = llm.generate(prompts, asked, f"draft-model:model={folder},confidence=0")
    for mine, theirs in zip(got, expected, strict=True):
        same(mine.choices[0], theirs.choices[0])
    assert got[0].choices[0].statistics.proposed > 0
    assert [generation.choices[0].statistics.proposed for generation in got[3:]] == [0, 0]


# Drafts


@pytest.mark.parametrize("width, length", [(1, 1), (1, 6), (2, 3), (3, 4)])
def test_children_are_the_drafters_own_likeliest(llm, width, length):
    """Each expanded node's children are what the small model gives when it reads the node's path alone."""
    drafts, _, contexts = recorded(llm, f"draft-model:width={width},length={length},confidence=0")
    small = llm.engine.drafter("draft-model")[1].model
    for number in (1, 4):
        for step, draft in enumerate(drafts[tuple(PROMPTS[number])][:2]):
            assert max(draft.depths()) == length
            known = contexts[tuple(PROMPTS[number])][step]
            for node, children in draft.children().items():
                path = [draft.tokens[each] for each in draft.path(node)]
                cache = llm.engine.cache.sequence()
                logits = small.forward(Rows.of(cache, known + path, 0), [len(known + path) - 1])[0]
                cache.release()
                assert [draft.tokens[child] for child in children] == logits.topk(width).indices.tolist()


def test_confidence(llm):
    """A chain ends behind the token that makes it too unlikely."""
    sure, *_ = recorded(llm, "draft-model:confidence=1,length=6")
    assert {len(draft) for own in sure.values() for draft in own} == {1}
    free, *_ = recorded(llm, "draft-model:confidence=0,length=6")
    assert {len(own[0]) for own in free.values()} == {6}
    some, *_ = recorded(llm, "draft-model:confidence=0.5,length=6")
    lengths = [len(draft) for own in some.values() for draft in own]
    assert 1 < sum(lengths) / len(lengths) < 6
    for draft, *_ in some.values():
        assert all(value >= 0.5 for value in draft.estimates[:-1])
        assert draft.estimates[-1] < 0.5 or len(draft) == 6


def test_shared_noise_carries_a_chain_through_improbable_tokens(llm):
    """A drafter that is the target itself draws what the target draws, however little probability a token has."""
    asked = SamplingParams(max_tokens=100, temperature=4.0, seed=1, ignore_eos=True)
    expected = llm.generate(PROMPTS[1:2], asked, "plain")[0]
    got = llm.generate(PROMPTS[1:2], asked, f"draft-model:model={llm.folder}")[0]
    same(got.choices[0], expected.choices[0])
    figures = got.choices[0].statistics
    assert figures.accepted == figures.proposed
    # The product of probabilities would end each chain at its first token: two tokens per step.
    assert figures.tokens_per_step > 3


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8}, {"frequency_penalty": 0.5}])
@pytest.mark.parametrize("ignore", [False, True])
def test_nothing_is_drafted_below_an_end_of_text(llm, settings, ignore):
    """Whichever of the engine's; the greedy chain of a lone request is drafted natively."""
    ends = set(range(2, VOCABULARY, 2))
    engine = Engine(llm.model, llm.tokenizer, ends, folder=str(llm.folder))
    drafter = engine.drafter("draft-model:confidence=0,length=8")[1]
    below = 0
    for seed in range(8):
        asked = SamplingParams(max_tokens=40, seed=seed, ignore_eos=ignore, **settings)
        (request,) = engine.add([5, 9 + seed], asked, drafter)
        engine.step()
        if request.finish_reason is None:
            draft = drafter.propose(request, 128)
            below += sum(token in ends for token in draft.tokens[:-1])
            engine.abort(request)
    assert (below > 0) == ignore


def test_budget_of_tokens(llm):
    drafts, *_ = recorded(llm, "draft-model:confidence=0,length=9", max_tokens=5)
    for own in drafts.values():
        # One token is the first step's, one the target's own.
        assert len(own[0]) == 3


@pytest.mark.parametrize("temperature, acceptance", [(0.0, "match"), (1.0, "match"), (1.0, "max")])
@pytest.mark.parametrize("width", [2, 4])
def test_trees(llm, width, temperature, acceptance):
    drafts, *_ = recorded(
        llm, f"draft-model:width={width},length=3", temperature=temperature, acceptance=acceptance, max_tokens=20
    )
    seen = [draft for own in drafts.values() for draft in own[:2]]
    for draft in seen:
        below = draft.children()
        assert max(draft.depths()) == 3
        for node, children in below.items():
            assert len(children) == width
            assert len({draft.tokens[child] for child in children}) == width
            assert (node in draft.drawn) == (acceptance == "max")
        # As many nodes are expanded per level as the width says.
        expanded = [draft.depths()[node] for node in below if node != ROOT]
        assert (expanded.count(1), expanded.count(2)) == (width, width)


def test_widest_tree_stays_within_the_budget(llm):
    _, outputs, _ = recorded(llm, "draft-model:width=8,length=32", max_tokens=40, prompts=PROMPTS[:2])
    assert outputs == recorded(llm, "draft-model", max_tokens=40, prompts=PROMPTS[:2])[1]
    engine = Engine(llm.model, llm.tokenizer, folder=str(llm.folder))
    drafter = engine.drafter("draft-model:width=8,length=32")[1]
    (request,) = engine.add(PROMPTS[1], SamplingParams(max_tokens=40), drafter)
    engine.step()
    draft = drafter.propose(request, 64)
    # It stops growing when the budget is used up, instead of drafting what will be cut off.
    assert 64 <= len(draft) <= 64 + 8 * 8
    engine.abort(request)


@pytest.mark.parametrize("temperature, acceptance", [(0.0, "match"), (0.9, "match"), (0.9, "max")])
@pytest.mark.parametrize("spec", ["draft-model", "draft-model:width=3,length=3"])
def test_a_batch_is_drafted_as_each_alone(llm, spec, temperature, acceptance):
    settings = {"temperature": temperature, "acceptance": acceptance}
    together, outputs, _ = recorded(llm, spec, **settings)
    alone, own_outputs, _ = recorded(llm, spec, alone=True, **settings)
    assert outputs == own_outputs
    assert together.keys() == alone.keys()
    for prompt in together:
        for one, other in zip(together[prompt], alone[prompt], strict=True):
            assert (one.tokens, one.parents) == (other.tokens, other.parents)
            assert one.drawn.keys() == other.drawn.keys()
            for node in one.drawn:
                torch.testing.assert_close(
                    one.drawn[node].probabilities, other.drawn[node].probabilities, atol=1e-5, rtol=0
                )


# Its cache


def test_cache_is_given_back(llm):
    engine = Engine(llm.model, llm.tokenizer, folder=str(llm.folder))
    drafter = engine.drafter("draft-model")[1]
    requests = [engine.add(prompt, SamplingParams(max_tokens=30), drafter)[0] for prompt in PROMPTS]
    for _ in range(3):
        engine.step()
    assert drafter.cache.used_bytes > 0
    for request in requests[1:]:
        engine.abort(request)
    finished = drafter.cache.used_bytes
    assert finished > 0 or requests[0].finish_reason
    for _ in engine.run():
        pass
    assert drafter.cache.used_bytes == 0
    assert drafter._sequences == {}


def test_a_full_context_is_drafted_to_the_end(llm):
    prompt = [7] * (CONTEXT - 10)
    asked = SamplingParams(ignore_eos=True)
    expected = llm.generate([prompt], asked, "plain")[0].choices[0]
    for spec in ("draft-model:confidence=0,length=32", "draft-model:width=4,length=6"):
        same(llm.generate([prompt], asked, spec)[0].choices[0], expected)
    assert len(expected.token_ids) == 10


@pytest.mark.skipif(not LIBRARY.exists(), reason="the native step was not built: no C++ compiler")
@pytest.mark.parametrize("spec", ["draft-model:confidence=0", "draft-model:length=9,confidence=0.05"])
def test_a_chain_in_one_native_call_is_the_chain_of_levels(llm, spec):
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    prompts = [[2, 3, 4] * 4, [9] * 7, list(range(10, 30))]
    drafter = llm.engine.drafter(spec)[1]
    seen = []
    for plain_tokens in (True, False):
        drafter.plain_tokens = plain_tokens
        made = [llm.generate([prompt], params, spec)[0] for prompt in prompts]
        seen.append([(each.token_ids, each.choices[0].statistics.accepted_per_step) for each in made])
        seen[-1].append(sum(each.choices[0].statistics.proposed for each in made))
    assert seen[0] == seen[1]
    assert seen[0][-1] > 100
    assert drafter.cache.used_bytes == 0
