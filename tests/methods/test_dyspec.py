"""DySpec: the tree is the best of its size, the small model is called rarely, the shape biases nothing."""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.laws import PROMPT, Law, by_engine, check_law, joint
from hasten import SamplingParams, UserError
from hasten.engine import ROOT, Draft, Engine
from hasten.engine.registry import parse
from hasten.methods.drafters.dyspec import DySpec, DySpecParameters
from hasten.model import OracleModel

LAW, OTHER = Law(seed=1), Law(seed=2)
WIDE, FLAT = Law(seed=3, size=12, spread=2.0), Law(seed=4, size=12, spread=0.5)


class OracleDySpec(DySpec):
    """The real method with a language in the small model's place, which counts its calls."""

    def __init__(self, target, parameters, law):
        self.law, self.calls = law, 0
        super().__init__(target, parameters)
        forward = self.model.forward

        def counted(*arguments):
            self.calls += 1
            return forward(*arguments)

        self.model.forward = counted

    def _load(self, target, parameters):
        return OracleModel(self.law, self.law.size)


def dyspec(law: Law, kind=OracleDySpec, **parameters):
    """From an engine to its drafter."""
    return lambda engine: kind(engine.target, DySpecParameters(**parameters), law)


def draft(law: Law, seed: int = 0, temperature: float = 0.0, acceptance: str = "match", left: int = 30, **parameters):
    """One draft behind the prompt's first token: the draft, the tokens before it, and the drafter."""
    engine = Engine(OracleModel(law, law.size))
    drafter = dyspec(law, **parameters)(engine)
    asked = SamplingParams(max_tokens=left + 1, seed=seed, temperature=temperature, acceptance=acceptance)
    (request,) = engine.add([seed % law.size, 1], asked, drafter)
    engine.step()
    drafter.calls = 0
    return drafter.propose(request, 128), tuple(request.tokens), drafter


def one_call_per_node(law: Law, history: tuple[int, ...], nodes: int, depth: int, temperature: float) -> Draft:
    """Algorithm 1 as printed, for greedy requests: (v, node) popped one by one, likeliest token first."""
    tree, paths, residuals = Draft(), {ROOT: history}, {}
    heap = [(-1.0, ROOT)]
    while heap and len(tree) < nodes:
        v, node = heappop(heap)
        if node not in residuals:
            residuals[node] = (law(paths[node]).double() / temperature).softmax(0)
        residual = residuals[node]
        token = int(residual.argmax())
        taken = float(residual[token])
        child = len(tree)
        tree.tokens.append(token)
        tree.parents.append(node)
        paths[child] = (*paths[node], token)
        residuals[node] = residual.clone()
        residuals[node][token] = 0
        if float(residuals[node].sum()) > 0:
            residuals[node] /= residuals[node].sum()
            heappush(heap, (v * (1 - taken), node))
        if len(paths[child]) - len(history) < depth:
            heappush(heap, (v * taken, child))
    return tree


def reached(tree: Draft, law: Law, history: tuple[int, ...], temperature: float) -> tuple[list[float], list[float]]:
    """v by its closed form, from the law itself: of every sample, and of the next one of every node and the root."""
    values, rest, found = {ROOT: 1.0}, {ROOT: 1.0}, []
    for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
        path = tuple(tree.tokens[each] for each in tree.path(parent))
        taken = float((law(history + path).double() / temperature).softmax(0)[token])
        found.append(values[parent] * rest[parent])
        values[node], rest[node] = values[parent] * taken, 1.0
        rest[parent] -= taken
    return found, [values[node] * rest[node] for node in values]


# The tree


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 6), st.sampled_from([0.3, 0.6, 1.0]))
def test_fixed_size_is_the_printed_algorithm(seed, nodes, depth, temperature):
    law = Law(seed % 50, size=7, spread=2.0)
    mine, history, drafter = draft(
        law, seed, construction="fixed", nodes=nodes, max_depth=depth, draft_temperature=temperature
    )
    expected = one_call_per_node(law, history, nodes, depth, temperature)
    assert (mine.tokens, mine.parents) == (expected.tokens, expected.parents)
    inner = len(set(mine.parents))
    assert drafter.calls <= inner


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "acceptance": "max"}], ids=["greedy", "sampled"])
def test_samples_come_in_falling_order_of_v(settings):
    for seed in range(5):
        tree, history, _ = draft(WIDE, seed, construction="fixed", nodes=30, **settings)
        values, _ = reached(tree, WIDE, history, 0.6)
        assert len(values) == 30
        assert values[0] == 1 and all(a >= b - 1e-6 for a, b in pairwise(values))
        if settings:
            assert tree.estimates == pytest.approx(values, abs=1e-5)
    branches = [len(children) for children in tree.children().values()]
    assert max(tree.depths()) > 2 and max(branches) > 1


def test_sum_of_v_is_largest():
    """Against random trees of the same size whose children are drawn in the same order."""
    rng = Random(0)
    for seed in range(3):
        tree, history, _ = draft(WIDE, seed, construction="fixed", nodes=16)
        best = sum(reached(tree, WIDE, history, 0.6)[0])
        sums = []
        for _ in range(300):
            other, counts, paths = Draft(), {ROOT: 0}, {ROOT: history}
            for node in range(16):
                parent = rng.choice(list(counts))
                token = int(WIDE(paths[parent]).argsort(descending=True)[counts[parent]])
                counts[parent] += 1
                other.tokens.append(token)
                other.parents.append(parent)
                counts[node], paths[node] = 0, (*paths[parent], token)
            sums.append(sum(reached(other, WIDE, history, 0.6)[0]))
        assert max(sums) < best
        # Not by accident of a flat law: chance finds much less.
        assert np.mean(sums) < 0.8 * best


@pytest.mark.parametrize("construction", ["fixed", "threshold"])
def test_a_child_that_the_shared_noise_names_is_worth_its_own_probability(construction):
    """Not all that is left: where both draw alike, a token that leads needs no siblings, however improbable it is."""
    siblings = 0
    for seed in range(6):
        engine = Engine(OracleModel(FLAT, FLAT.size))
        drafter = dyspec(FLAT, construction=construction, nodes=12)(engine)
        asked = SamplingParams(max_tokens=30, seed=seed, temperature=0.9)
        (request,) = engine.add([seed % FLAT.size, 1], asked, drafter)
        engine.step()
        drafter.beliefs.of(request).odds = -50.0
        tree = drafter.propose(request, 128)
        for node, children in tree.children().items():
            above = 1.0 if node == ROOT else tree.estimates[node]
            lead = tree.estimates[children[0]] / above
            siblings += len(children) > 1
            if construction == "threshold":
                assert all(tree.estimates[child] > 1 / 13 for child in children)
                assert len(children) == 1 or lead < 12 / 13
    assert siblings


@pytest.mark.parametrize("acceptance, temperature", [("match", 0.0), ("max", 0.9)])
def test_threshold_takes_all_above_it_level_by_level(acceptance, temperature):
    for seed in range(4):
        tree, history, drafter = draft(
            WIDE, seed, temperature, acceptance, nodes=128, threshold=0.04, draft_temperature=0.6
        )
        values, pending = reached(tree, WIDE, history, 0.6)
        assert 5 < len(tree) < 128 and min(values) > 0.04
        assert tree.depths() == sorted(tree.depths())
        assert drafter.calls <= max(tree.depths()) + 1
        # The next sample of every node would be at the threshold or below it.
        assert max(pending) <= 0.04 + 1e-6


def test_cap_drops_pending_samples_only():
    """A smaller limit gives the beginning of the level's samples, not a choice among drawn ones."""
    for seed in range(4):
        kwargs = {"seed": seed, "temperature": 1.0, "acceptance": "max", "threshold": 0.01, "max_depth": 1}
        whole, *_ = draft(FLAT, nodes=12, **kwargs)
        capped, *_ = draft(FLAT, nodes=5, **kwargs)
        assert len(capped) == 5 < len(whole)
        assert capped.tokens == whole.tokens[:5]


def test_calls_are_few_for_a_whole_batch():
    engine = Engine(OracleModel(WIDE, WIDE.size))
    drafter = dyspec(WIDE, nodes=40)(engine)
    requests = [engine.add([number, 1], SamplingParams(max_tokens=30), drafter)[0] for number in range(6)]
    engine.step()
    drafter.calls = 0
    trees = drafter.propose_all(requests, [128] * 6)
    assert drafter.calls <= max(max(tree.depths()) for tree in trees) + 1
    assert sum(map(len, trees)) > 6 * 15
    for request, tree in zip(requests, trees, strict=True):
        assert drafter.propose(request, 128) == tree


def test_lazy_evaluation_saves_calls():
    tree, _, drafter = draft(WIDE, construction="fixed", nodes=64)
    assert len(tree) == 64
    assert drafter.calls < len(set(tree.parents)) / 2


def test_limits():
    for construction in ("fixed", "threshold"):
        tree, *_ = draft(WIDE, construction=construction, nodes=100, max_depth=2, threshold=0.0)
        assert max(tree.depths()) == 2
        tree, *_ = draft(WIDE, construction=construction, nodes=30, left=3)
        assert max(tree.depths()) == 2
        # A vocabulary of five, two levels: everything there is.
        tree, *_ = draft(LAW, construction=construction, nodes=100, max_depth=2, threshold=1e-9)
        assert len(tree) == 5 + 25
        engine = Engine(OracleModel(LAW, 5))
        drafter = dyspec(LAW, construction=construction)(engine)
        (request,) = engine.add(PROMPT, SamplingParams(max_tokens=9), drafter)
        engine.step()
        assert len(drafter.propose(request, 3)) == 3
        assert drafter.propose(request, 0) == Draft()


def test_nothing_below_end_of_text():
    engine = Engine(OracleModel(LAW, 5), end_ids={2, 4})
    drafter = dyspec(LAW, nodes=30)(engine)
    for ignore in (False, True):
        (request,) = engine.add(PROMPT, SamplingParams(max_tokens=20, ignore_eos=ignore), drafter)
        engine.step()
        tree = drafter.propose(request, 64)
        for end in (2, 4):
            assert end in tree.tokens
            assert any(tree.tokens[parent] == end for parent in tree.parents if parent != ROOT) == ignore


# The law


@pytest.mark.parametrize("construction", ["fixed", "threshold"])
@pytest.mark.parametrize("nodes, settings", [(1, {}), (5, {}), (9, {"top_k": 3})])
def test_law_of_the_output(construction, nodes, settings):
    method = dyspec(OTHER, nodes=nodes, construction=construction)
    groups, _, accepted = by_engine(LAW, method, groups=6, count=80, acceptance="max", temperature=0.8, **settings)
    check_law(groups, joint(LAW.table(0.8, **settings), skipped=1))
    assert accepted > 200


class Pruned(OracleDySpec):
    """What must not be done: drawn nodes are dropped for their own small probability."""

    def propose_all(self, requests, budgets):
        trees = super().propose_all(requests, budgets)
        for number, (tree, request) in enumerate(zip(trees, requests, strict=True)):
            kept: list[int] = []
            for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
                path = tuple(tree.tokens[each] for each in tree.path(parent))
                likely = (self.law((*request.tokens, *path)) / 0.6).softmax(0)[token] > 0.35
                if likely and (parent == ROOT or parent in kept):
                    kept.append(node)
            trees[number] = tree.subset(kept)
        return trees


@pytest.mark.parametrize("construction", ["fixed", "threshold"])
def test_pruning_drawn_nodes_is_noticed(construction):
    method = dyspec(OTHER, Pruned, nodes=5, construction=construction)
    groups, _, accepted = by_engine(LAW, method, groups=6, count=80, acceptance="max", temperature=0.8)
    assert accepted > 100
    with pytest.raises(AssertionError):
        check_law(groups, joint(LAW.table(0.8), skipped=1))


# Parameters


def test_more_nodes_are_accepted_more_often():
    counts = []
    for nodes in (1, 4, 16):
        method = dyspec(OTHER, nodes=nodes, construction="fixed")
        counts.append(by_engine(LAW, method, groups=1, count=100)[2])
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("dyspec:nodes=0", "nodes must be between"),
        ("dyspec:construction=best", "construction must be threshold or fixed, not 'best'"),
        ("dyspec:threshold=1", "threshold must be"),
        ("dyspec:draft_temperature=0", "draft_temperature must be between"),
        ("dyspec:max_depth=99", "max_depth must be between"),
    ],
)
def test_bad_parameters(spec, message):
    with pytest.raises(UserError, match=f"^dyspec: {message}"):
        parse(spec)


def test_no_small_model():
    with pytest.raises(UserError, match="dyspec needs a model: use dyspec:model=FOLDER"):
        Engine(OracleModel(LAW, 5)).drafter("dyspec")
