"""SWIFT: what a skipped pass computes, what is drafted with it, that it leaves no trace, how skip sets are found."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import LlamaForCausalLM

from hasten import LLM, SamplingParams, UserError
from hasten.engine import ROOT, Draft, Engine, Limits, Observation, Target
from hasten.methods.drafters.shared_noise import MOST, START, Belief, together
from hasten.methods.skipping.swift import (
    TENANTS,
    Search,
    Skipped,
    Surrogate,
    Swift,
    SwiftParameters,
    forward,
)
from hasten.model import OracleModel, Rows, Span, load_model
from helpers import CONTEXT, VOCABULARY, PeakBytes, make_model, same

LAYERS = 6
FAINT = frozenset({2, 4})
"""Layers of the test model that add little to the residual stream; skipping just these costs nothing."""
PROMPTS = [[number * 13 % 140 + 2 for number in range(1, length)] for length in (2, 40, 7, 23, 61, 12)]
OFF: dict[str, Any] = {"max_trials": 0}


def save(folder: Path, faint: dict[int, float], **settings: Any) -> Path:
    """A random checkpoint some of whose layers write to the residual stream this much less than others."""
    model = make_model(num_hidden_layers=LAYERS, **settings)
    with torch.no_grad():
        for layer, scale in faint.items():
            model.model.layers[layer].self_attn.o_proj.weight.mul_(scale)
            model.model.layers[layer].mlp.down_proj.weight.mul_(scale)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def deep(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """Six layers, of which two hardly matter; the set that a search starts with skips others."""
    folder = tmp_path_factory.mktemp("deep") / "deep"
    shutil.copytree(tiny, folder)
    save(folder, {layer: 0.02 if layer in FAINT else 0.5 for layer in range(LAYERS)})
    return LLM(folder, dtype="float32")


def drafter_of(llm: LLM, **parameters: Any) -> Swift:
    return Swift(Target(llm.model), SwiftParameters(**{"interval": 1, **parameters}))


def running(llm: LLM, drafter: Swift, prompt: list[int] = PROMPTS[1], steps: int = 1, **settings: Any) -> Any:
    """An engine and one of its requests, some steps after the prompt was put in."""
    engine = Engine(llm.model, llm.tokenizer)
    asked = SamplingParams(**{"max_tokens": 60, "seed": 3, "ignore_eos": True, **settings})
    requests = engine.add(prompt, asked, drafter)
    for _ in range(steps):
        engine.step()
    return engine, requests


# Parameters and refusals


@pytest.mark.parametrize(
    "wrong",
    [
        "ratio=0",
        "ratio=1",
        "length=0",
        "length=65",
        "threshold=1.5",
        "width=0",
        "width=11",
        "window=3",
        "interval=0",
        "bayes_interval=0",
        "max_score=0",
        "max_tolerance=-1",
        "max_trials=-1",
        "drop=0",
    ],
)
def test_parameters_out_of_range(deep, wrong):
    with pytest.raises(UserError, match=f"^swift: {wrong.split('=')[0]} must"):
        deep.engine.drafter(f"swift:{wrong}")


def test_nothing_to_skip(llm):
    with pytest.raises(UserError, match="a model of 2 has none to skip; it needs at least 3"):
        llm.engine.drafter("swift")
    with pytest.raises(UserError, match="swift: needs a transformer"):
        Swift(Target(OracleModel(lambda history: None, 5)), SwiftParameters())


# The skipped pass


def logits_of(llm: LLM, tokens: list[int], skipped: Skipped) -> torch.Tensor:
    sequence = Engine(llm.model).cache.sequence()
    return forward(llm.model, Rows.of(sequence, tokens, 0), skipped)


def test_skipping_nothing_is_the_model(deep):
    sequence = deep.engine.cache.sequence()
    expected = deep.model.forward(Rows.of(sequence, PROMPTS[1], 0))
    sequence.release()
    got = logits_of(deep, PROMPTS[1], Skipped(frozenset(), frozenset()))
    # Composed of the model's pieces, which the native backend does not call.
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention, mlp", [({1, 3}, set()), (set(), {2, 4}), ({1, 2, 4}, {2, 3})])
def test_a_skipped_sublayer_adds_nothing(deep, attention, mlp):
    """As if the matrices that write its result to the residual stream were zero."""
    reference = LlamaForCausalLM.from_pretrained(deep.folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.inference_mode():
        for layer in attention:
            reference.model.layers[layer].self_attn.o_proj.weight.zero_()
        for layer in mlp:
            reference.model.layers[layer].mlp.down_proj.weight.zero_()
        expected = reference(torch.tensor([PROMPTS[1]])).logits[0]
    got = logits_of(deep, PROMPTS[1], Skipped(frozenset(attention), frozenset(mlp)))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


# Drafts


def in_one_pass(llm: LLM, tokens: list[int], further: list[int], skipped: Skipped) -> torch.Tensor:
    """The skipped model's logits for rows behind a prefix that the full model has read."""
    cache = Engine(llm.model).cache
    sequence = cache.sequence()
    llm.model.forward(Rows.of(sequence, tokens, 0))
    sequence.commit(len(tokens))
    return forward(llm.model, Rows.of(sequence, further, len(tokens)), skipped)


def main_chain(draft: Draft) -> list[int]:
    """Nodes that have children, in order, and the last level's first."""
    nodes, below = [], draft.children()
    node = ROOT
    while node in below:
        # Of the siblings at most one goes on.
        (node,) = [child for child in below[node] if child in below] or below[node][:1]
        nodes.append(node)
    return nodes


@pytest.mark.parametrize("width, widths", [(1, (1, 1, 1, 1)), (3, (1, 2, 3, 3)), (10, (3, 5, 8, 10))])
def test_greedy_drafts_are_the_skipped_models_choices(deep, width, widths):
    drafter = drafter_of(deep, width=width, length=7, threshold=0.3, **OFF)
    seen = set()
    for prompt in PROMPTS[1:]:
        engine, (request,) = running(deep, drafter, prompt, steps=2)
        draft = drafter.propose(request, 128)
        chain = main_chain(draft)
        tokens = [draft.tokens[node] for node in chain]
        rows = in_one_pass(
            deep, request.tokens[:-1], [request.tokens[-1], *tokens[:-1]], drafter.search("").skipped
        ).softmax(-1)
        certainty = 1.0
        for level, (row, parent) in enumerate(zip(rows, [ROOT, *chain], strict=False)):
            children = draft.children()[parent]
            confidence = float(row.max())
            seen.add(sum(confidence <= bound for bound in (0.95, 0.8, 0.5)))
            expected = widths[sum(confidence <= bound for bound in (0.95, 0.8, 0.5))]
            assert [draft.tokens[child] for child in children] == row.topk(expected).indices.tolist()
            got = [draft.estimates[child] for child in children]
            assert got == pytest.approx((certainty * row.topk(expected).values).tolist(), rel=1e-4)
            # It goes on exactly where it is confident.
            assert (level + 1 < len(rows)) == (confidence >= 0.3 and level < 6)
            certainty *= confidence
        engine.abort(request)
    assert len(seen) >= 3


@pytest.mark.parametrize("acceptance", ["match", "max"])
def test_sampled_drafts(deep, acceptance):
    """With shared noise the tree is what the skipped model itself would sample; else it says what it was drawn from."""
    drafter = drafter_of(deep, width=10, length=5, threshold=0.0, **OFF)
    engine, (request,) = running(deep, drafter, temperature=0.9, top_k=30, acceptance=acceptance)
    draft = drafter.propose(request, 128)
    levels = [[*group] for group in draft.children().values()]
    assert len(levels) == 5
    assert max(map(len, levels)) > 1
    skipped = drafter.search("").skipped
    for parent, children in draft.children().items():
        path = [draft.tokens[node] for node in draft.path(parent)]
        row = in_one_pass(deep, request.tokens[:-1], [request.tokens[-1], *path], skipped)[-1:]
        distribution = request.sampler.distribution(row, [path])
        tokens = [draft.tokens[child] for child in children]
        if acceptance == "max":
            torch.testing.assert_close(draft.drawn[parent].probabilities, distribution.dense(0), atol=1e-5, rtol=0)
            assert not draft.drawn[parent].replacement
            assert len(set(tokens)) == len(tokens)
        else:
            noisy = request.sampler.perturbed(distribution, [len(request.tokens) + len(path)])
            expected = distribution.ids[0, noisy[0].topk(len(tokens)).indices].tolist()
            assert sorted(tokens) == sorted(expected)
            chosen = request.sampler.choose(row, [len(request.tokens) + len(path)], [path])[0]
            follower = [child for child in children if child in draft.children()]
            assert all(draft.tokens[child] == chosen for child in follower)
    assert (draft.drawn.keys() == draft.children().keys()) == (acceptance == "max")
    engine.abort(request)


@pytest.mark.parametrize("odds", [-MOST, MOST])
def test_with_shared_noise_it_is_as_sure_as_its_belief(deep, odds):
    """Of what the noise names, not of the skipped model's own probability, which the target's draw does not follow."""
    drafter = drafter_of(deep, width=3, length=5, threshold=0.2, **OFF)
    engine, (request,) = running(deep, drafter, temperature=0.9)
    drafter.beliefs.of(request).odds = odds
    draft = drafter.propose(request, 128)
    skipped, nodes = drafter.search("").skipped, draft.children()
    for parent, children in nodes.items():
        path = [draft.tokens[node] for node in draft.path(parent)]
        row = in_one_pass(deep, request.tokens[:-1], [request.tokens[-1], *path], skipped)[-1:]
        scores = request.sampler.distribution(row, [path])
        noisy = request.sampler.perturbed(scores, [len(request.tokens) + len(path)])
        alone, alike = scores.dense(0), together(noisy, 0.9)[0]
        certainty = 1.0 if parent == ROOT else draft.estimates[parent]
        sure = [
            Belief(odds).of(float(alone[token]), float(alike[token]))
            for token in map(draft.tokens.__getitem__, children)
        ]
        assert [draft.estimates[child] for child in children] == pytest.approx([certainty * p for p in sure], rel=1e-3)
    tip = max(range(len(draft)), key=lambda node: draft.depths()[node])
    # It was sure enough of all that has something below it, by the same measure.
    for node in draft.path(tip)[:-1]:
        above = draft.parents[node]
        assert draft.estimates[node] >= 0.2 * (1.0 if above == ROOT else draft.estimates[above])
    engine.abort(request)


def test_its_belief_learns_and_ends_with_the_request(deep):
    drafter = drafter_of(deep, width=3, length=5, threshold=0.0, **OFF)
    engine, (request,) = running(deep, drafter, steps=4, temperature=0.9)
    assert drafter.beliefs.of(request).odds != START
    engine.abort(request)
    assert not drafter.beliefs._beliefs and not drafter.beliefs._drafted


@pytest.mark.parametrize("temperature, acceptance", [(0.0, "match"), (0.9, "match"), (0.9, "max")])
def test_nodes_that_are_cut(deep, temperature, acceptance):
    drafter = drafter_of(deep, width=8, length=6, threshold=0.0, **OFF)
    engine, (request,) = running(deep, drafter, temperature=temperature, acceptance=acceptance)
    whole = drafter.propose(request, 128)
    assert len(whole) > 8
    if acceptance == "max":
        # In the order of drawing: what was drawn must not decide what is cut.
        assert whole.estimates != sorted(whole.estimates, reverse=True)
    else:
        assert whole.estimates == sorted(whole.estimates, reverse=True)
    assert all(parent < node for node, parent in enumerate(whole.parents))
    few = drafter.propose(request, 6)
    assert (few.tokens, few.parents) == (whole.tokens[:6], whole.parents[:6])
    assert few.drawn.keys() <= set(range(-1, 6))
    assert len(drafter.propose(request, 1)) == 1
    assert not drafter.propose(request, 0)
    engine.abort(request)


@pytest.mark.parametrize("temperature, acceptance", [(0.0, "match"), (0.9, "match"), (0.9, "max")])
def test_a_batch_is_drafted_as_each_alone(deep, temperature, acceptance):
    drafter = drafter_of(deep, width=4, length=6, threshold=0.4, **OFF)
    engine = Engine(deep.model)
    asked = SamplingParams(max_tokens=30, temperature=temperature, acceptance=acceptance, seed=5, ignore_eos=True)
    requests = [engine.add(prompt, asked, drafter)[0] for prompt in PROMPTS]
    for _ in range(3):
        engine.step()
    together = drafter.propose_all(requests, [128] * len(requests))
    assert len({len(draft) for draft in together}) > 1
    for request, draft in zip(requests, together, strict=True):
        alone = drafter.propose(request, 128)
        assert (alone.tokens, alone.parents) == (draft.tokens, draft.parents)
        assert alone.estimates == pytest.approx(draft.estimates, abs=1e-5)
        engine.abort(request)


def test_a_full_context_is_drafted_to_the_end(deep):
    prompts = [[7] * (CONTEXT - 10), [9] * (CONTEXT - 1)]
    asked = SamplingParams(ignore_eos=True)
    expected = deep.generate(prompts, asked, "plain")
    for mine, theirs in zip(deep.generate(prompts, asked, "swift:threshold=0"), expected, strict=True):
        same(mine.choices[0], theirs.choices[0])
    assert len(expected[0].token_ids) == 10


# The cache


def state(cache: Any, sequence: Any) -> tuple[Any, ...]:
    """Everything that the target sees of a sequence's cache, down to the bits."""
    views = [
        (id(view.block), view.length, view.block.references, view.block.positions[: view.length].tolist())
        for view in sequence.groups[0]._views
    ]
    bits = [
        tensor[..., : view.length, :].contiguous().view(torch.int32).tolist()
        for view in sequence.groups[0]._views
        for tensor in (view.block.keys, view.block.values)
    ]
    return sequence.length, sequence.pending, views, bits, cache.used_bytes


@pytest.mark.parametrize("choices", [1, 3])
def test_drafting_and_trials_leave_the_cache_as_it_was(deep, choices):
    """The full model's keys and values stay, bit for bit, also where choices share their prompt's."""
    drafter = drafter_of(deep, window=8, width=4, threshold=0.0)
    engine, requests = running(deep, drafter, steps=3, n=choices, temperature=0.9)
    while min(len(request.output) for request in requests) < 10:
        engine.step()
    before = [state(engine.cache, request.sequence) for request in requests]
    search = drafter.search("")
    search.restart()
    trials = search.trials
    drafts = drafter.propose_all(requests, [128] * len(requests))
    assert all(max(draft.depths()) == 25 for draft in drafts)
    assert search.trials == trials + 1
    assert [state(engine.cache, request.sequence) for request in requests] == before
    for request in requests:
        # A verification afterwards gives what a fresh prefill gives.
        rows = Rows.of(request.sequence, request.tokens[-1:], len(request.tokens) - 1)
        fresh = Rows.of(engine.cache.sequence(), request.tokens, 0)
        expected = deep.model.forward(fresh)[-1]
        torch.testing.assert_close(deep.model.forward(rows)[0], expected, atol=1e-4, rtol=1e-4)
        fresh.spans[0].sequence.release()
        engine.abort(request)
    assert engine.cache.used_bytes == 0


def test_a_cache_without_room_for_trials(deep):
    """Requests that fit are not ended by the search."""
    asked = SamplingParams(max_tokens=40, ignore_eos=True)
    expected = deep.generate([PROMPTS[3]], asked, "plain")[0]
    roomy = Engine(deep.model)
    roomy.add(PROMPTS[3], asked)
    for _ in roomy.run():
        pass
    engine = Engine(deep.model, cache_bytes=roomy.cache.peak_bytes)
    drafter = drafter_of(deep, window=8)
    (request,) = engine.add(PROMPTS[3], asked, drafter)
    for _ in engine.run():
        pass
    assert request.output == expected.token_ids
    assert drafter.search("").best is None
    assert drafter.search("").trials > 0


# The output is the target's


SEARCHING = "swift:window=8,interval=1,threshold=0.2,bayes_interval=4,max_score=1,width=4,length=6"


def test_same_tokens_while_the_set_changes(deep):
    """Greedily and with every kind of sampling, in batches, as the search goes from bad sets to good ones."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8},
        {"temperature": 0.9, "top_p": 0.9, "top_k": 40},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.3},
        {"temperature": 0.7, "presence_penalty": 0.5, "logit_bias": {5: 3.0}, "min_p": 0.02},
    ]
    asked = [
        SamplingParams(**{"max_tokens": 40, "seed": number, "logprobs": 2, "ignore_eos": number % 3 > 0, **kind})
        for number, kind in enumerate(kinds * 4)
    ]
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(len(asked))]
    drafter = deep.engine.drafter(SEARCHING)[1]
    assert isinstance(drafter, Swift)
    chosen = {tuple(drafter.search("").chosen)}
    decide = Search.decide

    def watched(self: Search, *scores: Any) -> None:
        decide(self, *scores)
        chosen.add(tuple(self.chosen))

    accepted = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Search, "decide", watched)
        for start, count in ((0, 1), (1, 7), (8, 12)):
            batch = slice(start, start + count)
            expected = deep.generate(prompts[batch], asked[batch], "plain")
            got = deep.generate(prompts[batch], asked[batch], SEARCHING)
            for mine, theirs in zip(got, expected, strict=True):
                same(mine.choices[0], theirs.choices[0])
                accepted += mine.choices[0].statistics.accepted
    assert len(chosen) >= 3
    assert accepted > 200
    assert drafter._proposed == {}
    assert deep.engine.cache.used_bytes == 0


def test_choices_and_company(deep):
    asked = SamplingParams(max_tokens=30, temperature=0.8, seed=4, n=4, ignore_eos=True)
    expected = deep.generate(PROMPTS[:3], asked, "plain")
    got = deep.generate(PROMPTS[:3], asked, [SEARCHING, f"ngram+{SEARCHING}", f"{SEARCHING}+ngram"])
    for mine, theirs in zip(got, expected, strict=True):
        for one, other in zip(mine.choices, theirs.choices, strict=True):
            same(one, other)


def test_sliding_windows(make_checkpoint):
    """Layers that see a few tokens back only draft and are searched just so."""
    model = load_model(make_checkpoint("mistral", num_hidden_layers=5, sliding_window=6).folder, "float32")
    outputs = []
    for spec in ("plain", "swift:window=8,interval=1,threshold=0"):
        engine = Engine(model)
        requests = [engine.add(list(range(3, 20)), SamplingParams(max_tokens=30, ignore_eos=True), spec)[0]]
        for _ in engine.run():
            pass
        outputs.append(requests[0].output)
    assert requests[0].statistics.proposed > 0
    assert outputs[0] == outputs[1]


def test_the_classic_rules_keep_the_distribution(tmp_path):
    """Acceptance `max`: the joint law of two tokens of a five-token model, known exactly."""
    folder = save(tmp_path, dict.fromkeys(range(LAYERS), 0.6), vocab_size=5, hidden_size=16, intermediate_size=16)
    model = load_model(folder, "float32")
    prompt, temperature = [2, 3, 4], 2.5
    cache = Engine(model).cache

    def law(text: list[int]) -> np.ndarray:
        logits = model.forward(Rows.of(cache.sequence(), prompt + text, 0), [len(prompt + text) - 1])[0]
        return (logits / temperature).double().softmax(-1).numpy()

    exact = np.zeros((5, 5))
    for first, second in itertools.product(range(5), repeat=2):
        # The first token comes with the prompt, before any draft.
        exact[second] += law([])[first] * law([first])[second] * law([first, second])
    engine = Engine(model, limits=Limits(sequences=400))
    drafter = Swift(Target(model), SwiftParameters(width=6, threshold=0.1, length=2, **OFF))
    drawn = []
    accepted = 0
    for seed in range(2):
        asked = SamplingParams(max_tokens=4, n=400, seed=seed, temperature=temperature, acceptance="max")
        requests = engine.add(prompt, asked, drafter)
        for _ in engine.run():
            pass
        drawn += [request.output[1:3] for request in requests]
        accepted += sum(request.statistics.accepted for request in requests)
    assert accepted > 500
    observed = np.bincount(np.ravel_multi_index(tuple(np.array(drawn).T), exact.shape), minlength=25)
    expected = exact.ravel() * len(drawn)
    rare = np.argsort(expected)[:10]
    counts = np.append(np.delete(observed, rare), observed[rare].sum())
    wanted = np.append(np.delete(expected, rare), expected[rare].sum())
    assert wanted.min() > 5
    assert chisquare(counts, wanted).pvalue > 1e-3


# The search


def test_matchness_is_counted_over_the_latest_tokens(deep):
    drafter = drafter_of(deep, window=12, **OFF)
    engine, (request,) = running(deep, drafter, steps=1)
    while len(request.output) < 15:
        engine.step()
    scores = set()
    for skipped in (drafter.search("").skipped, Skipped(FAINT, FAINT), Skipped(frozenset({1}), frozenset({3}))):
        start = len(request.tokens) - 1 - 12
        rows = in_one_pass(deep, request.tokens[:start], request.tokens[start:-1], skipped)
        right = (rows.argmax(-1) == torch.tensor(request.tokens[start + 1 :])).sum()
        assert drafter.matchness(request, skipped) == pytest.approx(int(right) / 12)
        scores.add(int(right))
    assert 12 in scores
    assert len(scores) > 1
    engine.abort(request)


def test_trials_wait_for_a_window_of_output(deep):
    drafter = drafter_of(deep, window=16, threshold=1.0, width=1)
    engine, (request,) = running(deep, drafter, steps=1)
    while len(request.output) < 16:
        assert drafter.search("").trials == 0
        engine.step()
    drafter.propose(request, 8)
    assert drafter.search("").trials == 1
    engine.abort(request)


def test_the_search_finds_the_layers_that_do_not_matter(deep):
    """From a set that predicts badly to one that predicts well, and there it ends."""
    drafter = drafter_of(deep, ratio=0.5, window=16, bayes_interval=3, max_score=0.95)
    search = drafter.search("")
    assert not {1, 3} - search.skipped.attention
    engine, (request,) = running(deep, drafter, steps=1, max_tokens=190)
    first = None
    while search.active and engine.busy:
        engine.step()
        first = search.best if first is None else first
    assert not search.active
    assert first is not None
    assert first < 0.8 < 0.95 < search.best
    trials = search.trials
    assert 1 < trials < 190
    assert engine.busy
    engine.step()
    assert search.trials == trials
    engine.abort(request)


def test_sets_have_the_asked_size():
    for layers in (3, 4, 5, 16, 40):
        for ratio in (0.01, 0.25, 0.45, 0.8):
            search = Search(layers, SwiftParameters(ratio=ratio, bayes_interval=2))
            for score in (0.2, 0.4, 0.1, 0.3):
                sets = [search.chosen, search.suggest(), *search._neighbours()]
                for one in sets:
                    assert one.shape == (2 * (layers - 2),)
                    assert set(one.tolist()) <= {0.0, 1.0}
                    assert one.sum() == search.count == max(1, int(2 * (layers - 2) * ratio))
                skipped = search.layers_of(sets[1])
                assert len(skipped.attention) + len(skipped.mlp) == search.count
                assert (skipped.attention | skipped.mlp) <= set(range(1, layers - 1))
                search.surrogate.add(sets[1], score)


def test_first_set_is_every_second_layer():
    skipped = Search(9, SwiftParameters(ratio=0.6)).skipped
    assert skipped == Skipped(frozenset({1, 3, 5, 7}), frozenset({1, 3, 5, 7}))
    assert Search(9, SwiftParameters(ratio=0.3)).skipped == Skipped(frozenset({5, 7}), frozenset({5, 7}))


def test_stop_rules():
    def search(**parameters: Any) -> Search:
        return Search(8, SwiftParameters(**parameters))

    enough = search(max_score=0.8)
    enough.decide(enough.suggest(), 0.8, 0.3)
    assert enough.active
    better = enough.suggest()
    enough.decide(better, 0.85, 0.8)
    assert not enough.active
    assert np.array_equal(enough.chosen, better)

    patient = search(max_tolerance=2)
    for score, active in ((0.1, True), (0.4, True), (0.2, True), (0.2, True), (0.1, False)):
        patient.decide(patient.suggest(), score, 0.3)
        assert patient.active == active

    short = search(max_trials=3)
    for active in (True, True, False):
        short.decide(short.suggest(), 0.1, 0.3)
        assert short.active == active
    assert not search(max_trials=0).active

    few = Search(3, SwiftParameters())
    for active in (True, True, False):
        few.decide(few.suggest(), 0.1, 0.3)
        assert few.active == active


def test_a_lucky_score_does_not_last(deep, monkeypatch):
    """What the set in use once scored on an easy text does not keep better ones out."""
    drafter = drafter_of(deep, window=8, threshold=1.0, width=1, max_score=1)
    easy = {"now": True}
    search = drafter.search("")
    first = search.skipped

    def matchness(request: Any, skipped: Skipped) -> float:
        return 0.99 if easy["now"] else 0.4 if skipped == first else 0.6

    monkeypatch.setattr(drafter, "matchness", matchness)
    engine, (request,) = running(deep, drafter, steps=1)
    while search.best is None:
        engine.step()
    assert search.best == 0.99
    easy["now"] = False
    for _ in range(9):
        engine.step()
    assert search.best == 0.6
    assert search.skipped != first
    engine.abort(request)


def test_search_starts_again_when_acceptance_falls():
    search = Search(8, SwiftParameters(max_score=0.5))
    search.decide(search.suggest(), 0.6, 0.2)
    chosen = search.chosen
    for _ in range(100):
        search.accepted(0.9)
    assert not search.active
    for _ in range(200):
        search.accepted(0.85)
    assert not search.active
    further = 0
    while not search.active:
        search.accepted(0.3)
        further += 1
    assert 5 < further < 40
    assert (search.trials, search.best, len(search.surrogate.scores)) == (0, None, 0)
    assert np.array_equal(search.chosen, chosen)


def test_acceptance_is_watched(deep):
    """Shares of what was drafted by this method, at the positions that were reached."""
    drafter = drafter_of(deep, width=1, threshold=0.0, length=4, **OFF)
    engine, (request,) = running(deep, drafter)
    rates: list[float] = []
    drafter.search("").accepted = rates.append  # type: ignore[method-assign]
    draft = drafter.propose(request, 128)
    right, wrong = draft.tokens, (draft.tokens[2] + 1) % VOCABULARY
    nothing: Any = (torch.zeros(0), {})
    for tokens, rate in (
        ([*right[:2], wrong], 2 / 3),
        ([(right[0] + 1) % VOCABULARY], 0.0),
        ([*right, 5], 1.0),
        (right[:2], 1.0),
    ):
        drafter.propose(request, 128)
        request.tokens += tokens
        drafter.observe(request, Observation(draft, [], tokens, *nothing))
        assert rates.pop() == pytest.approx(rate)
        # What somebody else drafted is none of its business.
        drafter.observe(request, Observation(draft, [], tokens, *nothing))
        assert rates == []
        del request.tokens[-len(tokens) :]
    engine.abort(request)


def test_tenants_are_apart_and_bounded(deep):
    drafter = drafter_of(deep, window=8, threshold=0.5)
    engine = Engine(deep.model)
    requests = [
        engine.add(PROMPTS[1], SamplingParams(max_tokens=30, ignore_eos=True, tenant=tenant), drafter)[0]
        for tenant in ("one", "two", "one")
    ]
    for _ in engine.run():
        pass
    assert set(drafter._searches) == {"one", "two"}
    assert drafter.search("one").trials > 0
    assert requests[0].output == requests[1].output
    assert drafter.search("one").surrogate is not drafter.search("two").surrogate
    assert drafter.memory_bytes == sum(search.nbytes for search in drafter._searches.values()) > 0
    for number in range(TENANTS):
        drafter.search("one")
        drafter.search(f"tenant {number}")
    assert len(drafter._searches) == TENANTS
    assert "one" in drafter._searches
    assert "two" not in drafter._searches


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.8}, {"temperature": 0.8, "acceptance": "max"}, {"temperature": 0.8, "top_k": 9}],
    ids=str,
)
@pytest.mark.parametrize("parameters", [OFF, {"window": 16}], ids=["drafts", "trials"])
def test_what_drafts_take_for_a_while(deep, parameters, settings):
    drafter = drafter_of(deep, width=3, threshold=0.0, length=6, **parameters)
    asked = SamplingParams(max_tokens=40, seed=3, ignore_eos=True, **settings)
    propose_all, rounds = drafter.propose_all, []

    def watched(requests, budgets):
        said = drafter.scratch_bytes(requests, 12)
        with PeakBytes() as peak:
            drafts = propose_all(requests, [12] * len(requests))
        rounds.append((peak.most, said))
        return drafts

    drafter.propose_all = watched
    engine = Engine(deep.model)
    for prompt in PROMPTS[:2]:
        engine.add(prompt, asked, drafter)
    list(engine.run())
    assert all(most <= said for most, said in rounds)
    taken, announced = map(max, zip(*rounds, strict=True))
    assert announced < 6 * taken


# The Gaussian process


@given(st.integers(2, 12), st.integers(2, 9), st.integers(0, 10**6))
def test_surrogate_is_the_textbook_posterior(count, size, seed):
    rng = np.random.default_rng(seed)
    sets, scores = (rng.random((count, size)) < 0.5).astype(float), rng.random(count)
    surrogate = Surrogate(size)
    for one, score in zip(sets, scores, strict=True):
        surrogate.add(one, score)
    asked = (rng.random((5, size)) < 0.5).astype(float)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-((a - b) ** 2).sum() / (2 * size / 4)))

    gram = np.array([[kernel(a, b) for b in sets] for a in sets]) + 1e-2 * np.eye(count)
    inverse = np.linalg.inv(gram)
    normal = (scores - scores.mean()) / scores.std()
    for one, bound in zip(asked, surrogate.bound(asked), strict=True):
        cross = np.array([kernel(one, other) for other in sets])
        mean, variance = cross @ inverse @ normal, 1 - cross @ inverse @ cross
        assert bound == pytest.approx(mean + 2.5 * max(variance, 0) ** 0.5, abs=1e-4)


def test_surrogate_remembers_a_bounded_past():
    surrogate = Surrogate(6)
    for number in range(2 * Surrogate.REMEMBERED):
        surrogate.add(np.eye(6)[number % 6], number)
    assert surrogate.sets.shape == (Surrogate.REMEMBERED, 6)
    assert surrogate.scores[-1] == 2 * Surrogate.REMEMBERED - 1
    same_scores = Surrogate(3)
    for one in np.eye(3):
        same_scores.add(one, 0.5)
    assert np.isfinite(same_scores.bound(np.eye(3))).all()


def test_suggestions_beat_chance():
    """A planted best set: its neighbourhood scores higher the closer it is."""

    def best_of(bayes_interval: int) -> float:
        search = Search(16, SwiftParameters(bayes_interval=bayes_interval, max_score=1))
        planted = search._random_sets(1)[0]
        best = 0.0
        for _ in range(120):
            tried = search.suggest()
            score = float(tried @ planted) / search.count
            search.surrogate.add(tried, score)
            search.decide(tried, score, float(search.chosen @ planted) / search.count)
            best = max(best, score)
        return best

    assert best_of(5) >= best_of(10**6) + 0.15


def test_spans_extend_level_by_level(deep):
    """Rows fed one after the other give what they give in one pass, though skipped layers store nothing."""
    skipped = Skipped(frozenset({1, 4}), frozenset({2}))
    tokens, further = PROMPTS[1][:20], PROMPTS[1][20:27]
    sequence = Engine(deep.model).cache.sequence()
    deep.model.forward(Rows.of(sequence, tokens, 0))
    sequence.commit(len(tokens))
    rows = [
        forward(
            deep.model,
            Rows(torch.tensor([token]), torch.tensor([20 + level]), [Span(sequence, 0, 1, extend=level > 0)]),
            skipped,
        )
        for level, token in enumerate(further)
    ]
    torch.testing.assert_close(torch.cat(rows), in_one_pass(deep, tokens, further, skipped), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"temperature": 1.0, "acceptance": "max"}], ids=str)
def test_a_skipped_model_without_finite_logits(deep, monkeypatch, settings):
    def broken(model, rows, skipped):
        return torch.full((len(rows.tokens), model.config.vocab_size), torch.nan)

    monkeypatch.setattr("hasten.methods.skipping.swift.forward", broken)
    engine, (request,) = running(deep, drafter_of(deep, **OFF), **settings)
    engine.step()
    assert "the model's logits are not finite" in str(request.error)
