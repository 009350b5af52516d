"""What drafters with a small model share: how children are drawn, what pending rows see, and its cache."""

from __future__ import annotations

from gc import collect
from itertools import islice
from weakref import ref

import numpy as np
import pytest
import torch

from hasten import LLM, SamplingParams, UserError
from hasten.engine import ROOT, Engine
from hasten.engine.sampling.sampler import likeliest_of_model
from hasten.methods.drafters.draft_model import DraftModel, DraftModelParameters
from hasten.methods.drafters.dyspec import DySpec, DySpecParameters
from hasten.methods.drafters.small_model import Growth, SmallModelDrafter
from hasten.model import OracleModel, Rows
from helpers import PeakBytes


class Random(Growth):
    """Grows at random: some of the nodes, in any order, are expanded in each round."""

    def __init__(self, drafter, request, nodes=40, depth=9, width=3):
        super().__init__(drafter, request, nodes, depth)
        self.width, self.rng = width, np.random.default_rng(len(request.tokens))
        self.unread = []
        self.logits = {}

    def grow(self, logits):
        for node, row, children in zip(self.frontier, logits, self.children(logits, self.width), strict=True):
            self.logits[node] = row.clone()
            for token, probability in islice(children, min(self.width, self.nodes - len(self.draft))):
                child = self.add(node, token, probability)
                if len(self.paths[child]) < self.depth:
                    self.unread.append(child)
        self.rng.shuffle(self.unread)
        count = int(self.rng.integers(1, 4)) if len(self.draft) < self.nodes else 0
        self.frontier, self.unread = self.unread[:count], self.unread[count:]


class RandomDrafter(SmallModelDrafter):
    def __init__(self, model):
        super().__init__(model)
        self.growths = []

    def start(self, request, budget):
        self.growths.append(Random(self, request))
        return self.growths[-1]


def grown(llm, prompts, **settings):
    """One draft per prompt behind its first token: the growths."""
    engine = Engine(llm.model)
    drafter = RandomDrafter(llm.model)
    asked = SamplingParams(max_tokens=40, seed=4, ignore_eos=True, **settings)
    requests = [engine.add(prompt, asked, drafter)[0] for prompt in prompts]
    engine.step()
    drafter.growths.clear()
    drafter.propose_all(requests, [128] * len(requests))
    return drafter.growths, drafter, requests


PROMPTS = [[5, 9, 20, 33], [7] * 30, list(range(2, 60))]


def test_each_node_sees_its_own_path(llm):
    """Whatever was fed before, and in whatever order: a node's logits are those of its path read alone."""
    growths, _, _ = grown(llm, PROMPTS)
    for growth in growths:
        depths = growth.draft.depths()
        assert len(growth.draft) == 40 and max(depths) > 3 and len(growth.logits) > 6
        for node, logits in growth.logits.items():
            cache = llm.engine.cache.sequence()
            known = growth.request.tokens + growth.paths[node]
            alone = llm.model.forward(Rows.of(cache, known, 0), [len(known) - 1])[0]
            cache.release()
            torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)
            assert growth.paths[node] == [growth.draft.tokens[each] for each in growth.draft.path(node)]


@pytest.mark.parametrize("temperature, acceptance", [(0.0, "match"), (0.7, "match"), (0.7, "max")])
def test_estimates(llm, temperature, acceptance):
    growths, drafter, _ = grown(llm, PROMPTS, temperature=temperature, acceptance=acceptance)
    for growth in growths:
        assert (set(growth.draft.drawn) == set(growth.draft.parents)) == growth.sampled == (acceptance == "max")
        taken: dict[int, float] = {}
        for node, (token, parent) in enumerate(zip(growth.draft.tokens, growth.draft.parents, strict=True)):
            scores = growth.logits[parent] / (temperature or 1)
            law = scores.double().softmax(0)
            if temperature and acceptance == "match":
                sampler, place = growth.request.sampler, len(growth.request.tokens) + len(growth.paths[parent])
                noise = torch.tensor(sampler.noise(place, range(len(scores))))
                alike = ((scores + noise) * temperature).softmax(0)
                law = torch.tensor(list(map(drafter.beliefs.of(growth.request).of, law.tolist(), alike.tolist())))
            value = float(law[token]) * growth.values[parent]
            before = growth.values[parent] * (1 - taken.get(parent, 0.0))
            assert growth.values[node] == pytest.approx(value, abs=1e-6)
            assert growth.draft.estimates[node] == pytest.approx(before if growth.sampled else value, abs=1e-6)
            taken[parent] = taken.get(parent, 0.0) + float(law[token])


def test_children_with_shared_noise_are_the_targets_order(llm):
    growths, _, requests = grown(llm, PROMPTS, temperature=0.7)
    compared = 0
    for growth, request in zip(growths, requests, strict=True):
        for node, children in growth.draft.children().items():
            position, path = len(request.tokens) + len(growth.paths[node]), growth.paths[node]
            logits = growth.logits[node].unsqueeze(0)
            first = request.sampler.choose(logits, [position], [path])[0]
            assert growth.draft.tokens[children[0]] == first
            compared += 1
    assert compared > 20


def test_what_is_not_asked_for_is_not_drawn(llm):
    """A coin is thrown for a child only when the child is asked for."""
    growths, drafter, requests = grown(llm, PROMPTS[:1], temperature=1.0, acceptance="max")
    growth = Random(drafter, requests[0])
    thrown = growth._coins._count
    children = growth.children(growths[0].logits[ROOT].unsqueeze(0), 3)[0]
    assert growth._coins._count == thrown and not growth.draft.drawn
    next(children)
    assert growth._coins._count == thrown + 1 and list(growth.draft.drawn) == [ROOT]


def test_asked_twice_and_memory(llm):
    growths, drafter, requests = grown(llm, PROMPTS)
    first = [growth.draft for growth in growths]
    drafter.growths.clear()
    again = drafter.propose_all(requests, [128] * 3)
    assert [draft.tokens for draft in again] == [draft.tokens for draft in first]
    weights = drafter.model.weight_bytes()
    assert drafter.memory_bytes - weights == drafter.cache.used_bytes > 0
    for request in requests:
        drafter.end(request)
    assert drafter.memory_bytes == weights


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"temperature": 1.0, "acceptance": "max"}], ids=str)
def test_a_small_model_without_finite_logits(llm, value, settings):
    """It is told, and what goes on without it is not the worse for it."""
    size = llm.model.config.vocab_size

    def law(history):
        return torch.full((size,), value if history[-2:] == (9, 9) else 0.0)

    engine, drafter = Engine(llm.model), RandomDrafter(OracleModel(law, size))
    params = SamplingParams(max_tokens=8, seed=4, ignore_eos=True, logit_bias={9: 1e6}, **settings)
    (sick,) = engine.add([5], params, drafter)
    (well,) = engine.add([7], SamplingParams(max_tokens=8, ignore_eos=True))
    with pytest.raises(UserError, match="the model's logits are not finite"):
        for _ in engine.run():
            pass
    engine.abort(sick)
    for _ in engine.run():
        pass
    assert well.output == llm.generate([[7]], SamplingParams(max_tokens=8, ignore_eos=True))[0].token_ids
    assert engine.cache.used_bytes == drafter.cache.used_bytes == 0


class OracleDraft(DraftModel):
    """Draws from a law in the small model's place."""

    def _load(self, target, parameters):
        return oracle()


class OracleTree(DySpec):
    def _load(self, target, parameters):
        return oracle()


def oracle(size: int = 4000) -> OracleModel:
    """Eight tokens are likely, none more than the others by much: trees become as wide as they may."""
    table = torch.rand(7, size, generator=torch.Generator().manual_seed(0))
    table[:, 40:48] += 14
    return OracleModel(lambda history: table[sum(history[-2:]) % 7], size)


def measured(engine, drafter, prompts, nodes: int, **settings) -> list[tuple[int, int]]:
    """Per round of drafts: bytes that they took beside caches, at most, and what was said."""
    params = SamplingParams(**{"max_tokens": 40, "seed": 4, "ignore_eos": True, **settings})
    propose_all, rounds = drafter.propose_all, []

    def watched(requests, budgets):
        said, used = drafter.scratch_bytes(requests, nodes), drafter.cache.used_bytes
        with PeakBytes() as peak:
            drafts = propose_all(requests, [nodes] * len(requests))
        rounds.append((peak.most - (drafter.cache.used_bytes - used), said))
        return drafts

    drafter.propose_all = watched
    for prompt in prompts:
        engine.add(prompt, params, drafter)
    for _ in engine.run():
        pass
    return rounds


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.2},
        {"temperature": 0.8},
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 0.8, "acceptance": "max"},
        {"temperature": 0.8, "acceptance": "max", "top_p": 0.9},
        {"temperature": 0.8, "acceptance": "typical"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "make",
    [
        lambda target: OracleDraft(target, DraftModelParameters(confidence=0)),
        lambda target: OracleDraft(target, DraftModelParameters(width=4, length=4)),
        lambda target: OracleTree(target, DySpecParameters(nodes=16)),
        lambda target: OracleTree(target, DySpecParameters(nodes=16, construction="fixed")),
    ],
    ids=["chain", "levels", "threshold", "fixed"],
)
def test_what_drafts_take_for_a_while(make, settings):
    """Of logits: there is nothing else with an oracle."""
    for batch in (1, 3):
        engine = Engine(oracle())
        rounds = measured(engine, make(engine.target), PROMPTS[:batch], 16, **settings)
        assert all(most <= said for most, said in rounds)
        taken, announced = map(max, zip(*rounds, strict=True))
        assert announced < 7 * taken


@pytest.mark.parametrize("spec", ["draft-model", "draft-model:width=3", "dyspec:nodes=20", "vocabtrim:width=2", "s2d"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "acceptance": "max"}], ids=str)
def test_what_the_small_model_takes_for_a_while(tiny, monkeypatch, spec, settings):
    """Of its passes: a prompt is read in pieces, and what those take does not grow with it."""
    target = LLM(tiny, dtype="float32", backend="torch")
    taken, announced = {}, {}
    for reading in (256, 32):
        monkeypatch.setattr("hasten.methods.drafters.small_model.READING", reading)
        engine = Engine(target.model, target.tokenizer, folder=str(tiny))
        prompts = [[5, 9, 20, 33], [7] * 200, list(range(2, 100))]
        rounds = measured(engine, engine.drafter(spec)[1], prompts, 20, **settings)
        assert all(most <= said for most, said in rounds)
        taken[reading], announced[reading] = map(max, zip(*rounds, strict=True))
    assert announced[256] < 4 * taken[256]
    assert taken[32] < taken[256] / 2 and announced[32] < announced[256] / 2


def test_a_prompt_in_pieces_is_the_same_prompt(llm, monkeypatch):
    drafts = []
    for reading in (256, 5, 1):
        monkeypatch.setattr("hasten.methods.drafters.small_model.READING", reading)
        growths, drafter, _ = grown(llm, PROMPTS)
        drafts.append([growth.draft.tokens for growth in growths])
        assert [sequence.length for sequence in drafter._sequences.values()] == [len(prompt) + 1 for prompt in PROMPTS]
    assert drafts[0] == drafts[1] == drafts[2]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_greedy_drafts_of_a_model_without_finite_logits(value):
    """The search for the likeliest tells: only logits that are adjusted first are searched before."""
    size = 150
    well = torch.arange(size, dtype=torch.float32)
    broken = torch.full((size,), value) if value < 0 else torch.where(well == 7, value, well)
    engine = Engine(OracleModel(lambda history: well, size))
    drafter = RandomDrafter(OracleModel(lambda history: broken if len(history) > 4 else well, size))
    (request,) = engine.add([5, 6], SamplingParams(max_tokens=8, ignore_eos=True), drafter)
    with pytest.raises(UserError, match="the model's logits are not finite"):
        list(engine.run())
    assert request.finish_reason == "error" and drafter.cache.used_bytes == 0


def test_greedy_drafting_searches_its_logits_once(llm, monkeypatch):
    searches = []

    def searched(logits):
        searches.append(len(logits))
        return likeliest_of_model(logits)

    monkeypatch.setattr("hasten.methods.drafters.small_model.likeliest_of_model", searched)
    grown(llm, PROMPTS)
    assert not searches
    grown(llm, PROMPTS, logit_bias={3: 1.0})
    assert searches


def test_specifications_share_one_small_model(llm):
    engine = Engine(llm.model, llm.tokenizer, folder=str(llm.folder))
    specs = ("draft-model", "draft-model:width=2,length=3", "dyspec", "auto:candidates=ngram/draft-model:confidence=0")
    first, second, third, auto = (engine.drafter(spec)[1] for spec in specs)
    assert first.model is second.model is third.model is auto.drafters[1].model
    other = engine.drafter("draft-model:dtype=bfloat16")[1]
    assert other.model is not first.model
    # Nothing is kept for its own sake.
    gone = ref(other.model)
    engine._preparation._drafters.clear()
    del other
    collect()
    assert gone() is None


def test_a_shared_model_counts_once(llm):
    """Whoever asks several drafters: their caches are their own, the weights are not."""
    engine = Engine(llm.model, llm.tokenizer, folder=str(llm.folder))
    (drafter, trimmed) = (engine.drafter(spec)[1] for spec in ("draft-model", "vocabtrim"))
    weights = drafter.memory_bytes
    assert weights == drafter.model.weight_bytes() > 0
    head = trimmed.model.head.nbytes()
    assert 0 < head < trimmed.memory_bytes < weights
    for spec, expected in (
        ("draft-model+dyspec", weights),
        ("draft-model+dyspec+vocabtrim", weights + head),
        ("auto:candidates=draft-model/dyspec/draft-model:width=2", weights),
        (
            "draft-model+draft-model:dtype=bfloat16",
            weights + engine.drafter("draft-model:dtype=bfloat16")[1].memory_bytes,
        ),
        ("specmemo:drafter=draft-model/dyspec", weights),
    ):
        both = engine.drafter(spec)[1]
        assert both.memory_bytes == expected, spec
    both = engine.drafter("draft-model+dyspec")[1]
    (request,) = engine.add([5, 9, 20], SamplingParams(max_tokens=40, ignore_eos=True), both)
    for _ in range(3):
        engine.step()
    caches = sum(each.cache.used_bytes for each in both.drafters)
    assert caches > 0 and both.memory_bytes == weights + caches
    engine.abort(request)
