"""STAND: the stored distributions, how children are drawn from them, the static tree, and the law of the output."""

from __future__ import annotations

from collections import Counter, OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conformance.laws import Law, by_engine, check_law, joint
from hasten import SamplingParams, UserError
from hasten.engine import ROOT, Draft, Engine, Target
from hasten.engine.sampling.sampler import Sampler
from hasten.methods.drafters.stand import (
    TREE,
    Entry,
    Stand,
    StandParameters,
    calibrate,
    full_tree,
    load_tree,
    ranked,
)
from hasten.model import OracleModel
from helpers import Scripted, same

SIZE = 5
LAW = Law(seed=1)


def request(tokens, number=0, **params):
    asked = SamplingParams(**{"seed": 3, "temperature": 1.0, **params})
    return SimpleNamespace(
        id=number, tokens=list(tokens), params=asked, choice=0, sampler=Sampler(asked, 0, list(tokens), SIZE)
    )


def drafter(**parameters) -> Stand:
    return Stand(Target(OracleModel(lambda history: None, SIZE)), StandParameters(**parameters))


def entry(probabilities) -> Entry:
    """All of a vocabulary's probabilities, as they are stored."""
    order = np.argsort(-np.asarray(probabilities), kind="stable")
    return Entry(tuple(order.tolist()), tuple(np.asarray(probabilities)[order].tolist()))


# What is stored


def test_running_mean():
    """The paper's example: "I am" is met twice."""
    bob, mary, tom, sue = range(4)
    first = Entry((bob, mary, tom), (0.7, 0.2, 0.05))
    both = first.met_again(Entry((mary, bob, sue), (0.6, 0.3, 0.05)), top=10, floor=0.001)
    assert both.ids == (bob, mary, tom, sue)
    assert both.probabilities == pytest.approx((0.5, 0.4, 0.025, 0.025))
    assert both.hits == 2
    assert first.met_again(first, 2, 0.001).ids == (bob, mary)
    assert first.met_again(Entry((), ()), 10, 0.03).ids == (bob, mary)


simplex = st.lists(st.floats(0.01, 1), min_size=SIZE, max_size=SIZE).map(lambda w: [each / sum(w) for each in w])


@given(st.lists(simplex, min_size=1, max_size=5))
def test_mean_of_many(meetings):
    mean = entry(meetings[0])
    for meeting in meetings[1:]:
        mean = mean.met_again(entry(meeting), SIZE, 1e-9)
    exact = np.mean(meetings, 0)
    assert mean.hits == len(meetings)
    assert mean.probabilities == pytest.approx(exact[list(mean.ids)])
    assert list(mean.probabilities) == sorted(mean.probabilities, reverse=True)


PARAMS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.3, "temperature": 0.8},
    {"logit_bias": {2: 1.5, 0: -80.0}},
    {"temperature": 0.9, "top_k": 4, "top_p": 0.8, "min_p": 0.1, "logit_bias": {1: -0.5}},
]


@pytest.mark.parametrize("settings", PARAMS)
def test_processed_as_the_target_is(settings):
    """Where every token is stored, q is the sampler's own distribution."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = 2 * torch.randn(1, SIZE, generator=generator)
        ids, q = entry(logits[0].double().softmax(0).numpy()).processed(
            SamplingParams(**{"temperature": 1.0, **settings}), 1e-9
        )
        exact = request([0], **settings).sampler.distribution(logits, [[]]).dense(0)
        got = torch.zeros(SIZE, dtype=torch.float64).index_add_(
            0, torch.tensor(ids), torch.tensor(q, dtype=torch.float64)
        )
        torch.testing.assert_close(got, exact, atol=1e-5, rtol=0)
        assert q == sorted(q, reverse=True)


def test_extreme_processing():
    peaked = entry([0.9, 0.05, 0.03, 0.01, 0.006, 0.004])
    assert peaked.processed(SamplingParams(temperature=0.01), 0.001) == ([0], [1.0])
    assert peaked.processed(SamplingParams(), 0.001)[1] == pytest.approx(peaked.probabilities)
    assert peaked.processed(SamplingParams(temperature=1, logit_bias={5: 1e6}), 0.001) == ([5], [1.0])
    barred = SamplingParams(temperature=1, logit_bias=dict.fromkeys(range(6), -torch.inf))
    assert peaked.processed(barred, 0.001) == ([], [])
    assert Entry((), ()).processed(SamplingParams(), 0.001) == ([], [])
    assert len(peaked.processed(SamplingParams(temperature=1), 0.007)[0]) == 4


@pytest.mark.parametrize("rejected", [False, True])
@pytest.mark.parametrize("method", ["stand", "ngram+stand"])
def test_contexts_are_those_of_the_rows(method, rejected):
    """Under a law of two tokens, whatever is stored for a context must be that context's exact distribution."""
    spec = f"{method.replace('stand', '')}stand:floor=1e-9,rejected={rejected}".replace("ngram+", "ngram:minimum=1+")
    _, engine, _ = by_engine(LAW, spec, groups=2, count=10)
    made = engine.drafter(spec)[1]
    table = (made.drafters[1] if "+" in spec else made)._table
    exact = LAW.table()
    sizes = Counter(len(key) - 1 for key in table)
    assert set(sizes) == {2, 3, 4} and sizes[2] > 10
    for (tenant, *context), stored in table.items():
        assert tenant == ""
        p = exact[context[-2], context[-1]]
        assert stored.probabilities == pytest.approx(p[list(stored.ids)].tolist(), abs=1e-5)
        assert len(stored.ids) == LAW.size


def test_rejected_nodes_teach_more():
    meetings = []
    for rejected in (False, True):
        engine = Engine(OracleModel(LAW, LAW.size))
        made = Stand(engine.target, StandParameters(rejected=rejected, nodes=12))
        asked = engine.add([0, 1], SamplingParams(temperature=1.0, max_tokens=100, seed=1), made)[0]
        for _ in engine.run():
            pass
        keys = asked.statistics.tokens + rejected * (asked.statistics.proposed - asked.statistics.accepted)
        pairs = sum(stored.hits for key, stored in made._table.items() if len(key) == 3)
        # Of the last step nothing is told.
        assert keys - 20 < pairs <= keys
        meetings.append(pairs)
    assert meetings[1] > 1.5 * meetings[0] > 0


def test_bounded_and_apart():
    made = drafter(minimum=1, entries=8)
    for number in range(50):
        made._learn("one", (number, 1, 2), Entry((3,), (1.0,)))
    assert len(made._table) == 8
    assert made._lookup("one", (0, 1, 2)).hits == 50
    assert made._lookup("one", (49, 1, 2)).hits == 1
    assert made._lookup("other", (49, 1, 2)) is None
    assert 0 < made.memory_bytes < 8000


def test_private_entries_die_with_their_request():
    engine = Engine(OracleModel(LAW, LAW.size))
    made = Stand(engine.target, StandParameters(shared=False))
    asked = SamplingParams(temperature=1.0, max_tokens=60, seed=1, n=2)
    requests = engine.add([0, 1], asked, made)
    for _ in range(9):
        engine.step()
    assert {owner for owner, *_ in made._table} == {each.id for each in requests}
    for _ in engine.run():
        pass
    assert made._table == {}
    assert all(each.statistics.accepted > 0 for each in requests)


def test_longest_known_context_first():
    made = drafter(hits=2)
    made._learn("", (1, 2, 3, 4), Entry((1,), (1.0,)))
    assert made._lookup("", (1, 2, 3, 4)) is None
    made._learn("", (0, 2, 3, 4), Entry((2,), (1.0,)))
    assert made._lookup("", (1, 2, 3, 4)).ids == (1, 2)
    made._learn("", (1, 2, 3, 4), Entry((1,), (1.0,)))
    assert made._lookup("", (1, 2, 3, 4)).ids == (1,)
    assert made._lookup("", (4,)) is None


# Children


def test_noise_is_the_targets():
    sampler = request([0], seed=8).sampler
    distribution = sampler.distribution(torch.zeros(1, SIZE), [[]])
    expected = sampler.perturbed(distribution, [17])[0].tolist()
    assert sampler.noise(17, range(SIZE)) == pytest.approx(expected, abs=1e-6)
    assert sampler.noise(17, [4, 2]) == pytest.approx([expected[4], expected[2]], abs=1e-6)


def warm(**parameters) -> Stand:
    """Knows `LAW` for every pair of tokens."""
    made = drafter(**{"maximum": 2, "floor": 1e-9, **parameters})
    table = LAW.table()
    for first in range(LAW.size):
        for second in range(LAW.size):
            made._learn("", (first, second), entry(table[first, second].numpy()))
    return made


def test_children_of_each_kind():
    made = warm(nodes=9)
    exact = LAW.table()

    def paths(draft: Draft) -> dict[int, list[int]]:
        return {node: [draft.tokens[child] for child in below] for node, below in draft.children().items()}

    greedy = made.propose(request([0, 1], temperature=0), 64)
    assert not greedy.drawn and len(greedy) == 9
    assert paths(greedy)[ROOT] == exact[0, 1].topk(len(paths(greedy)[ROOT])).indices.tolist()
    asked = request([0, 1])
    matched = made.propose(asked, 64)
    noisy = asked.sampler.perturbed(asked.sampler.distribution(LAW.logits[0, 1][None], [[]]), [2])[0]
    assert not matched.drawn
    assert paths(matched)[ROOT] == noisy.topk(len(paths(matched)[ROOT])).indices.tolist()
    assert made.propose(request([0, 1], acceptance="typical"), 64).tokens == greedy.tokens
    assert warm(nodes=9, sampled=False).propose(asked, 64).tokens == greedy.tokens
    drawn = made.propose(request([0, 1], acceptance="max"), 64)
    assert set(drawn.drawn) == set(drawn.children())
    for node, below in paths(drawn).items():
        said = drawn.drawn[node]
        assert not said.replacement
        assert len(set(below)) == len(below)
        context = [0, 1, *(drawn.tokens[step] for step in drawn.path(node))]
        torch.testing.assert_close(said.probabilities, exact[context[-2], context[-1]][said.ids], atol=1e-6, rtol=0)
    seeds = {tuple(made.propose(request([0, 1], acceptance="max", seed=seed), 64).tokens) for seed in range(8)}
    assert len(seeds) > 1


def test_estimates():
    """Along a path they fall; the better known a context, the surer its first child."""
    made = warm(nodes=9)
    for settings in ({}, {"temperature": 0}, {"acceptance": "max"}):
        draft = made.propose(request([0, 1], **settings), 64)
        for node, parent in enumerate(draft.parents):
            above = 1.0 if parent == ROOT else draft.estimates[parent]
            assert 0 < draft.estimates[node] <= above
        siblings = [draft.estimates[child] for child in draft.children()[ROOT]]
        assert siblings[0] > 0.5 > sum(siblings[1:])
        assert sum(siblings) <= 1 + 1e-9
    plain = warm(nodes=9, sampled=False).propose(request([0, 1]), 64)
    chance = [float(LAW.table()[0, 1, plain.tokens[child]]) for child in plain.children()[ROOT]]
    assert [plain.estimates[child] for child in plain.children()[ROOT]] == pytest.approx(chance, abs=1e-6)


def test_budget_takes_the_first_nodes():
    made = warm()
    whole = made.propose(request([0, 1]), 64)
    for budget in (0, 1, 5, len(whole)):
        part = made.propose(request([0, 1]), budget)
        assert (part.tokens, part.parents) == (whole.tokens[:budget], whole.parents[:budget])


def test_missing_nodes_are_left_out():
    made = drafter(nodes=16)
    assert made.propose(request([0, 1]), 64) == Draft()
    made._learn("", (0, 1), Entry((2, 3), (0.6, 0.4)))
    made._learn("", (1, 2), Entry((5,), (1.0,)))
    draft = made.propose(request([0, 1], temperature=0), 64)
    assert (draft.tokens, draft.parents) == ([2, 5, 3], [ROOT, 0, ROOT])


# The law of the output


class Fixed(Stand):
    """Never learns: its table stays as wrong as it was made."""

    def observe(self, request, seen):
        pass


def adversarial(**parameters):
    """From an engine to a drafter with a random distribution for every pair of tokens, some tokens missing."""

    def make(engine: Engine) -> Stand:
        made = Fixed(engine.target, StandParameters(maximum=2, nodes=8, **parameters))
        rng = np.random.default_rng(5)
        for first in range(LAW.size):
            for second in range(LAW.size):
                shares = rng.dirichlet(np.full(LAW.size, 0.4)) * (rng.random(LAW.size) < 0.7)
                stored = entry(shares)
                kept = sum(p >= made.parameters.floor for p in stored.probabilities)
                made._learn("", (first, second), Entry(stored.ids[:kept], stored.probabilities[:kept]))
        return made

    return make


LAWS = {
    "warm, max": ("stand:nodes=8", {"acceptance": "max", "temperature": 0.7}, 300),
    "warm, max, filters": ("stand:nodes=8,rejected=true", {"acceptance": "max", "top_k": 3}, 300),
    "warm, match": ("stand:nodes=8", {}, 300),
    "adversarial, max": (adversarial(), {"acceptance": "max"}, 100),
    "adversarial, likeliest, max": (adversarial(sampled=False), {"acceptance": "max", "temperature": 0.7}, 100),
}


@pytest.mark.parametrize("name", LAWS)
def test_law(name):
    method, settings, least = LAWS[name]
    groups, _, accepted = by_engine(LAW, method, groups=8, count=100, **settings)
    check_law(groups, joint(LAW.table(settings.get("temperature", 1.0), settings.get("top_k", 0)), skipped=1))
    assert accepted > least


def test_a_right_table_is_always_accepted():
    """Table and target agree and share their noise: the first child is the target's own draw, as deep as the tree."""
    engine = Engine(OracleModel(LAW, LAW.size))
    made = warm(tree="")
    made._plant(("0", "00", "000", "0000"))
    asked = SamplingParams(temperature=0.8, max_tokens=41, seed=2)
    for settings in ({}, {"acceptance": "max"}):
        one = engine.add([0, 1], SamplingParams(**{**vars(asked), **settings}), made)[0]
        for _ in engine.run():
            pass
        assert one.statistics.accepted_per_step == [0] + [4] * 8


def test_later_choices_take_fewer_steps():
    """The first trajectory fills the table for those after it; sampled children are worth more than the likeliest."""
    law = Law(seed=3, size=8, spread=1.5)
    steps = {}
    for spec in ("stand:nodes=8", "stand:nodes=8,sampled=false"):
        engine = Engine(OracleModel(law, law.size))
        figures = []
        for seed in range(12):
            one = engine.add([0, 1], SamplingParams(temperature=0.9, max_tokens=60, seed=seed), spec)[0]
            for _ in engine.run():
                pass
            figures.append(one.statistics.tokens_per_step)
        steps[spec] = figures
    sampled, likeliest = steps.values()
    assert np.mean(sampled[4:]) > 1.3 * sampled[0]
    assert np.mean(sampled[4:]) > 1.1 * np.mean(likeliest[4:])


def test_mixed_company(llm):
    """Temperatures differ, the table is one, the text is plain decoding's."""
    prompts = [[5, 6, 7, 5, 6], [9, 8], [30, 31, 32]]
    for temperature in (0.0, 0.5, 1.1):
        asked = SamplingParams(max_tokens=24, temperature=temperature, seed=4, n=2, ignore_eos=True)
        expected = llm.generate(prompts, asked, "plain")
        got = llm.generate(prompts, asked, "stand:minimum=1,nodes=8")
        for mine, theirs in zip(got, expected, strict=True):
            for one, other in zip(mine.choices, theirs.choices, strict=True):
                same(one, other)


# The tree


def is_tree(tree) -> bool:
    known = {""}
    for path in tree:
        elder = path[:-1] + str(int(path[-1]) - 1) if path[-1] != "0" else ""
        if path in known or path[:-1] not in known or elder not in known:
            return False
        known.add(path)
    return True


def test_built_in_tree():
    assert is_tree(TREE)
    assert len(TREE) >= 32


def test_full_tree():
    assert full_tree((2, 1)) == ("0", "1", "00", "10")
    assert is_tree(full_tree((10, 2, 1)))


@given(st.dictionaries(st.sampled_from(full_tree((3, 2, 2))), st.integers(0, 9)), st.integers(1, 40))
def test_ranked(counts, nodes):
    tree = full_tree((3, 2, 2))
    best = ranked(counts, tree, nodes)
    assert is_tree(best)
    assert len(best) == min(nodes, len(tree)) and set(best) <= set(tree)


def test_ranked_by_count():
    tree = full_tree((3, 2))
    counts = {"0": 9, "00": 5, "1": 6, "10": 2, "2": 1, "20": 1}
    assert ranked(counts, tree, 4) == ("0", "1", "00", "10")
    assert ranked({**counts, "2": 8}, tree, 3) == ("0", "1", "2")
    assert ranked({}, full_tree((10,)), 99) == full_tree((10,))


def test_calibrate():
    """A law that follows one path most of the time asks for a deep tree, a flat one for a broad tree."""

    def steep(history):
        return torch.nn.functional.one_hot(torch.tensor((history[-1] + 1) % 5), 5) * 9.0

    def flat(history):
        return torch.tensor([1.0, 1.1, 1.2, 1.3, 1.4])

    trees = []
    for law in (steep, flat):
        engine = Engine(OracleModel(law, 5))
        asked = SamplingParams(temperature=1.0, max_tokens=40, n=2, seed=1)
        trees.append(calibrate(engine, [[0, 1], [2, 3]], asked, 6, StandParameters(sampled=False)))
    assert trees[0] == ("0", "00", "000", "0000", "00000", "000000")
    assert is_tree(trees[1]) and sum(len(path) == 1 for path in trees[1]) >= 3


def test_tree_files(tmp_path):
    file = tmp_path / "tree"
    file.write_text("0 00\n1\n")
    assert load_tree(file) == ("0", "00", "1")
    assert drafter(tree=str(file))._parents == [ROOT, 0, ROOT]
    assert drafter(tree=str(file), nodes=2)._parents == [ROOT, 0]
    for wrong in ("00 0", "1 0", "0 0", "0 0x", "0 ²", "", "0 02"):
        file.write_text(wrong)
        with pytest.raises(UserError, match=r"^stand: "):
            load_tree(file)
    with pytest.raises(UserError, match="cannot read the tree"):
        drafter(tree=str(tmp_path / "none"))


@pytest.mark.parametrize(
    "changes", [{"minimum": 5}, {"hits": 0}, {"top": 0}, {"nodes": -1}, {"floor": 0.0}, {"entries": 0}, {"maximum": 17}]
)
def test_parameters_out_of_range(changes):
    with pytest.raises(UserError, match=r"^stand: "):
        StandParameters(**changes)


def test_drafts_of_others_are_learnt_from():
    """A composition shows it drafts that are not its own."""
    engine = Engine(OracleModel(LAW, LAW.size))
    made = warm()
    made._table = OrderedDict()
    other = Scripted(lambda request: Draft([0, 1, 2, 3], [ROOT, ROOT, 0, 1]))
    other.observe = made.observe
    engine.add([0, 1], SamplingParams(temperature=1.0, max_tokens=40, seed=1), other)
    for _ in engine.run():
        pass
    assert len(made._table) > 10
