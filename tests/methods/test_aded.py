"""ADED: the counted table, its adaptation, the two searches, and that neither changes what is generated."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from conformance.laws import Law, by_engine, check_law, joint
from hasten import LLM, SamplingParams, UserError
from hasten.engine import ROOT, Draft, Engine, Target
from hasten.engine.sampling.sampler import Sampler
from hasten.methods.drafters.aded import SEARCH_PURPOSE, Aded, AdedParameters, TrigramTable, build_table, read_texts
from hasten.model import OracleModel
from helpers import END, same

VOCABULARY = 100
TARGET = Target(OracleModel(lambda history: None, VOCABULARY))


def request(tokens, number=0, choice=0, tenant="", prompt_length=None):
    params = SamplingParams(seed=3, tenant=tenant)
    return SimpleNamespace(
        id=number,
        tokens=list(tokens),
        prompt_length=len(tokens) if prompt_length is None else prompt_length,
        choice=choice,
        params=params,
        sampler=Sampler(params, choice, [], VOCABULARY),
    )


def drafter(**parameters) -> Aded:
    return Aded(TARGET, AdedParameters(**parameters))


def known(made: Aded, *pair: int, tenant: str = "") -> dict[int, float]:
    """What the drafter expects after two tokens."""
    return dict(zip(*made._after(tenant, pair), strict=True))


def prefixes(draft: Draft) -> list[tuple[int, ...]]:
    """The tokens of each node's path; no two nodes have the same."""
    paths = [tuple(draft.tokens[step] for step in draft.path(node)) for node in range(len(draft))]
    assert len(set(paths)) == len(paths)
    assert all(parent < node for node, parent in enumerate(draft.parents))
    return paths


# Counting

texts = st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=6)


@given(texts, st.integers(1, 3))
def test_counts(sequences, successors):
    """The definition: P(c | a, b) over all sequences, the most frequent few of each bigram."""
    counts: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for sequence in sequences:
        for first, second, third in zip(sequence, sequence[1:], sequence[2:], strict=False):
            counts[first, second][third] += 1
    if not counts:
        with pytest.raises(UserError, match="nothing to count"):
            build_table(sequences, successors)
        return
    table = build_table(sequences, successors)
    assert len(table.bigrams) == len(counts)
    for first in range(4):
        for second in range(4):
            expected = counts.get((first, second), Counter())
            best = sorted(expected.items(), key=lambda item: (-item[1], item[0]))[:successors]
            tokens, weights = table.after(first, second)
            assert tokens == [token for token, _ in best]
            assert weights == pytest.approx([count / expected.total() for _, count in best])


def test_file(tmp_path):
    table = build_table([[1, 2, 3, 1, 2, 4, 1, 2, 3]])
    table.save(tmp_path / "table")
    read = TrigramTable.load(tmp_path / "table")
    for name in ("bigrams", "starts", "tokens", "weights"):
        np.testing.assert_array_equal(getattr(read, name), getattr(table, name))
    made = drafter(table=str(tmp_path / "table"))
    assert known(made, 1, 2) == pytest.approx({3: 2 / 3, 4: 1 / 3})
    assert made.memory_bytes == table.memory_bytes > 0


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="aded: cannot read the table"):
        drafter(table=str(tmp_path / "none"))
    (tmp_path / "noise").write_bytes(b"noise" * 9)
    with pytest.raises(UserError, match="aded: cannot read the table"):
        drafter(table=str(tmp_path / "noise"))
    save_file({"bigrams": np.zeros(3, np.int64)}, tmp_path / "other")
    with pytest.raises(UserError, match="is not a table of tri-grams"):
        drafter(table=str(tmp_path / "other"))
    table = build_table([[1, 2, 3], [1, 2, 4], [2, 3, 5]])
    for name, value in {
        "bigrams": table.bigrams[::-1].copy(),
        "starts": table.starts + 1,
        "tokens": table.tokens[:-1],
        "weights": -table.weights,
    }.items():
        arrays = {each: getattr(table, each) for each in ("bigrams", "starts", "tokens", "weights")}
        save_file({**arrays, name: value}, tmp_path / "damaged")
        with pytest.raises(UserError, match="is damaged"):
            drafter(table=str(tmp_path / "damaged"))
    build_table([[1, 2, VOCABULARY]]).save(tmp_path / "foreign")
    with pytest.raises(UserError, match="another tokenizer"):
        drafter(table=str(tmp_path / "foreign"))
    with pytest.raises(UserError, match="cannot write"):
        table.save(tmp_path / "no" / "folder")
    with pytest.raises(UserError, match="token ids must be between"):
        build_table([[1, 2, 1 << 21]])


def test_texts(llm, tmp_path):
    (tmp_path / "a.txt").write_text("the cat and the moon", encoding="utf-8")
    assert list(read_texts([tmp_path / "a.txt"], llm.tokenizer)) == [
        llm.tokenizer("the cat and the moon", add_special_tokens=False)["input_ids"]
    ]
    with pytest.raises(UserError, match=r"cannot read .*b\.txt"):
        list(read_texts([tmp_path / "b.txt"], llm.tokenizer))


@pytest.mark.parametrize(
    "changes",
    [{"search": "depth"}, {"nodes": 0}, {"depth": 0}, {"successors": 0}, {"increment": 4.0}, {"bigrams": 0}, {"c2": 0}],
)
def test_parameters_out_of_range(changes):
    with pytest.raises(UserError, match=r"^aded: "):
        AdedParameters(**changes)


# Adaptation


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=8))
def test_each_trigram_is_counted_once(steps):
    """However many steps it stays in sight, and also when a step asked nobody for a draft."""
    made = drafter(increment=0.5, cap=100.0)
    asked = request([])
    for index, step in enumerate(steps):
        asked.tokens += step
        if index % 3:
            made.propose(asked, 8)
    made.end(asked)
    expected = Counter(zip(asked.tokens, asked.tokens[1:], asked.tokens[2:], strict=False))
    found = {
        (*pair, token): weight / 0.5
        for (_, *pair), entry in made._adapted.items()
        for token, weight in zip(entry.tokens, entry.weights, strict=True)
    }
    assert found == expected
    assert all(entry.weights == sorted(entry.weights, reverse=True) for entry in made._adapted.values())
    assert made._counted == {}


def test_choices_count_their_prompt_once():
    made = drafter(increment=0.04)
    for choice in range(3):
        asked = request([1, 2, 3], number=choice, choice=choice)
        made.propose(asked, 8)
        asked.tokens += [4]
        made.end(asked)
    assert made._adapted["", 1, 2].weights == pytest.approx([0.04])
    assert made._adapted["", 2, 3].weights == pytest.approx([0.12])


def test_weights_are_capped_and_the_newest_of_equals_leads():
    made = drafter(increment=1.0)
    made.end(request([1, 2, 3] * 9 + [1, 2, 4] * 9))
    assert made._adapted["", 1, 2].weights == [3.0, 3.0]
    assert made._adapted["", 1, 2].tokens == [4, 3]


def test_bounds():
    made = drafter(successors=2, bigrams=3)
    for token in (3, 3, 4, 5):
        made.end(request([1, 2, token]))
    assert known(made, 1, 2) == pytest.approx({3: 2 / 3, 5: 1 / 3})
    for token in range(10, 40):
        made.end(request([token, 7, 8]))
        made.end(request([1, 2, 3]))
    assert len(made._adapted) == 3
    assert list(made._adapted)[-1] == ("", 1, 2)
    assert 0 < made.memory_bytes < 3000


def test_tenants_are_apart(tmp_path):
    build_table([[5, 6, 7]]).save(tmp_path / "table")
    made = drafter(table=str(tmp_path / "table"), increment=0.04)
    made.end(request([5, 6, 8, 9], tenant="one"))
    assert known(made, 5, 6, tenant="one") == pytest.approx({7: 1 / 1.04, 8: 0.04 / 1.04})
    assert known(made, 5, 6, tenant="other") == {7: 1.0}
    assert known(made, 6, 8, tenant="other") == {}


def test_private_entries_die_with_their_request():
    made = drafter(shared=False)
    one, other = request([1, 2, 3, 1, 2], number=1), request([1, 2], number=2, choice=1)
    assert made.propose(one, 1).tokens == [3]
    assert made.propose(other, 1) == Draft()
    assert made.propose(request([1, 2, 4, 1, 2], number=3, choice=1), 1).tokens == [4]
    made.end(one)
    assert {owner for owner, _, _ in made._adapted} == {3}


def test_a_frozen_table_stays():
    made = drafter(increment=0.0)
    made.end(request([1, 2, 3, 1, 2, 3]))
    assert made.memory_bytes == 0
    assert made.propose(request([1, 2, 3, 1, 2]), 8) == Draft()


# The tree


@given(texts, st.integers(1, 20), st.integers(1, 5))
def test_heap_takes_the_likeliest_prefixes(sequences, nodes, depth):
    made = drafter(nodes=nodes, depth=depth)
    for sequence in sequences:
        made.end(request(sequence))
    asked = request([0, 1])
    every = {(): 1.0}
    level = [()]
    for _ in range(depth):
        longer = []
        for prefix in level:
            for token, share in known(made, *(0, 1, *prefix)[-2:]).items():
                every[*prefix, token] = every[prefix] * share
                longer.append((*prefix, token))
        level = longer
    del every[()]
    draft = made.propose(asked, 64)
    assert len(draft) == min(nodes, len(every))
    assert draft.estimates == pytest.approx([every[prefix] for prefix in prefixes(draft)])
    assert draft.estimates == pytest.approx(sorted(every.values(), reverse=True)[:nodes])
    assert draft.estimates == sorted(draft.estimates, reverse=True)


@given(texts, st.integers(1, 20), st.integers(1, 5))
def test_puct_finds_a_part_of_them(sequences, nodes, depth):
    best, made = (
        drafter(nodes=nodes, depth=depth, search=search, iterations=40, paths=8) for search in ("heap", "puct")
    )
    for sequence in sequences:
        best.end(request(sequence))
        made.end(request(sequence))
    draft, other = made.propose(request([0, 1]), 64), best.propose(request([0, 1]), 64)
    assert bool(draft) == bool(other)
    chances = {}
    for prefix, estimate in zip(prefixes(draft), draft.estimates, strict=True):
        share = known(made, *(0, 1, *prefix)[-3:-1])[prefix[-1]]
        chances[prefix] = chances.get(prefix[:-1], 1.0) * share
        assert estimate == pytest.approx(chances[prefix])
    assert len(draft) <= min(nodes, 16)
    assert max(draft.depths(), default=0) <= depth
    assert sum(draft.estimates) <= sum(other.estimates) + 1e-9
    assert made.propose(request([0, 1]), 64) == draft


def test_puct_visits_what_is_likely():
    """A sure path is searched to its end, and its last token is the likeliest successor."""
    made = drafter(search="puct", iterations=60, paths=4, depth=4)
    made.end(request([1, 2, 3, 4, 5, 6, 7, 8] * 20 + [1, 2, 9]))
    draft = made.propose(request([1, 2], number=1), 64)
    assert prefixes(draft)[:4] == [(3,), (3, 4), (3, 4, 5), (3, 4, 5, 6)]
    assert (9,) in prefixes(draft)


def puct(made: Aded, asked, iterations: int, depth: int, paths: int, c1: float, c2: float):
    """The search as the paper has it: the prefix that each iteration selects, and those that are kept."""
    selected = []
    luck = random.Random(asked.sampler.coins(len(asked.tokens), SEARCH_PURPOSE).draw())
    visits: Counter[tuple[int, ...]] = Counter()
    value: dict[tuple[int, ...], float] = defaultdict(float)

    def after(prefix: tuple[int, ...]) -> dict[int, float]:
        return known(made, *(*asked.tokens[-2:], *prefix)[-2:])

    def share(prefix: tuple[int, ...]) -> float:
        return after(prefix[:-1])[prefix[-1]]

    def promise(child: tuple[int, ...]) -> float:
        """Mean value, and what speaks for looking again: its prior, the parent's visits, and few of its own."""
        if not visits[child]:
            return math.inf
        above = visits[child[:-1]]
        explore = (c1 + math.log((above + c2 + 1) / c2)) * share(child) * math.sqrt(above) / (1 + visits[child])
        return value[child] / visits[child] + explore

    for _ in range(iterations):
        leaf: tuple[int, ...] = ()
        while len(leaf) < depth - 1 and (leaf == () or visits[leaf]) and after(leaf):
            leaf = max(((*leaf, token) for token in after(leaf)), key=promise)
        selected.append(leaf)
        path = leaf
        while len(path) < depth - 1 and after(path):
            path = (*path, luck.choices(list(after(path)), list(after(path).values()))[0])
        for length in range(len(leaf) + 1):
            visits[leaf[:length]] += 1
            value[leaf[:length]] += 1 + sum(share(path[:step]) for step in range(1, len(path) + 1))

    def chance(prefix: tuple[int, ...]) -> float:
        return math.prod(share(prefix[:step]) for step in range(1, len(prefix) + 1))

    ranked = sorted((each for each in visits if each), key=lambda each: (-visits[each], -chance(each), len(each)))
    kept = ranked[:paths]
    return selected, {*kept, *((*each, next(iter(after(each)))) for each in kept if after(each))}


def selections(made: Aded, asked) -> tuple[list[tuple[int, ...]], set[tuple[int, ...]]]:
    """What the drafter's own search selects and keeps."""
    selected = []
    descend = made._descend

    def watched(owner, node):
        found = descend(owner, node)
        prefix, at = (), found
        while at.parent is not None:
            prefix, at = (at.pair[1], *prefix), at.parent
        selected.append(prefix)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "_descend", watched)
        draft = made.propose(asked, 64)
    return selected, set(prefixes(draft))


SURE_BELOW = [[0, 1, 2, token] for token in range(4, 9)] * 6 + [[0, 1, 3, 9]] * 20
"""Behind 0, 1 stands 2 three times of five, and then one of five; or 3, and then always 9: the better value."""


@pytest.mark.parametrize(("c1", "c2"), [(0.0, 1e9), (0.3, 1e9), (0.0, 0.5), (1.0, 8.0), (32.0, 8.0)])
@pytest.mark.parametrize("iterations", [40, 150])
def test_puct_is_the_papers_search(c1: float, c2: float, iterations: int):
    made = drafter(
        search="puct", iterations=iterations, paths=3, depth=4, nodes=64, c1=c1, c2=c2, increment=0.02, cap=100.0
    )
    for sequence in SURE_BELOW:
        made.end(request(sequence))
    for number in range(4):
        asked = request([*range(20, 20 + number), 0, 1], number=number)
        assert selections(made, asked) == puct(made, asked, iterations, 4, 3, c1, c2)


def test_puct_exploits_without_the_exploration_term_and_follows_the_prior_with_it():
    """The sure continuation has the better value, the other one the larger share: the constant decides between them."""
    most = {}
    for c1 in (0.0, 32.0):
        made = drafter(search="puct", iterations=150, paths=1, depth=4, c1=c1, c2=1e9, increment=0.02, cap=100.0)
        for sequence in SURE_BELOW:
            made.end(request(sequence))
        most[c1] = prefixes(made.propose(request([0, 1], number=1), 64))[0]
    assert most == {0.0: (3,), 32.0: (2,)}


@pytest.mark.parametrize("search", ["heap", "puct"])
def test_budget_and_silence(search):
    made = drafter(search=search)
    made.end(request([1, 2, 3, 4, 5]))
    assert made.propose(request([1, 2], number=1), 2).tokens == [3, 4]
    assert made.propose(request([1, 2], number=2), 0) == Draft()
    assert made.propose(request([2], number=3), 8) == Draft()
    assert made.propose(request([9, 9], number=4), 8) == Draft()


@pytest.mark.parametrize("search", ["heap", "puct"])
def test_nothing_below_special_tokens(llm, search):
    made = Aded(Target(llm.model, llm.tokenizer), AdedParameters(search=search))
    made.end(request([5, 6, END, 7, 8, 9]))
    assert made.propose(request([5, 6], number=1), 8).tokens == [END]
    assert made.propose(request([6, END], number=2), 8) == Draft()
    assert made.propose(request([7, 8], number=3), 8).tokens == [9]


# With an engine

LAW = Law(seed=1)


@pytest.mark.parametrize(
    "parameters, settings",
    [
        ({}, {}),
        ({"search": "puct", "iterations": 12}, {"acceptance": "max"}),
        ({"table": "random"}, {"acceptance": "max", "temperature": 0.7}),
    ],
    ids=["heap", "puct, max", "random table, max"],
)
def test_law(parameters, settings, tmp_path):
    """Sampling gives the target's law, one draw per node: empty start, and a table of nonsense."""
    if "table" in parameters:
        build_table(np.random.default_rng(0).integers(0, 5, (20, 30)).tolist()).save(tmp_path / "table")
        parameters = {**parameters, "table": str(tmp_path / "table"), "increment": 0.0}

    def make(engine: Engine) -> Aded:
        return Aded(engine.target, AdedParameters(nodes=8, **parameters))

    groups, _, accepted = by_engine(LAW, make, groups=8, count=100, **settings)
    check_law(groups, joint(LAW.table(settings.get("temperature", 1.0)), skipped=1))
    assert accepted > 300


def test_learns_a_cycle():
    """Tokens per step are known: one each until the cycle of 9 closes, then `depth` and the target's own."""
    model = OracleModel(lambda history: torch.nn.functional.one_hot(torch.tensor((history[-1] + 1) % 9), 9) * 9.0, 9)
    engine = Engine(model)
    asked = engine.add([0, 1], SamplingParams(max_tokens=64), "aded:depth=6")[0]
    frozen = engine.add([0, 1], SamplingParams(max_tokens=64), "aded:depth=6,increment=0")[0]
    for _ in engine.run():
        pass
    assert asked.output == frozen.output
    assert asked.statistics.accepted_per_step[:17] == [0] * 9 + [6] * 7 + [5]
    assert frozen.statistics.accepted == 0


def test_pays_on_what_it_counted(tiny, tmp_path):
    """A table of answers is worth steps at once, an empty one in the second round; the answers stay the same."""
    llm = LLM(tiny, dtype="float32")
    asked = SamplingParams(max_tokens=24, ignore_eos=True)
    prompts = [[number, number + 1, number + 2] for number in range(20, 80, 6)]
    plain = [generation.choices[0] for generation in llm.generate(prompts, asked, "plain")]
    answers = [[*prompt, *choice.token_ids] for prompt, choice in zip(prompts, plain, strict=True)]
    build_table(answers).save(tmp_path / "table")
    specs = [f"aded:table={tmp_path / 'table'},increment=0", "aded", "aded"]
    steps = []
    for spec in specs:
        got = [llm.generate([prompt], asked, spec)[0].choices[0] for prompt in prompts]
        for mine, theirs in zip(got, plain, strict=True):
            same(mine, theirs)
        steps.append(sum(choice.steps for choice in got))
    counted, empty, adapted = steps
    assert counted < empty
    assert adapted < empty
    assert all(one < other for one, other in pairwise([adapted, empty, 24 * len(prompts)]))


def test_root_of_a_draft_is_the_last_token():
    made = drafter()
    made.end(request([1, 2, 3, 1, 2, 4]))
    draft = made.propose(request([1, 2], number=1), 64)
    assert [draft.tokens[node] for node in draft.children()[ROOT]] == [4, 3]


@pytest.mark.parametrize("search", ["heap", "puct"])
def test_nothing_is_drafted_below_any_end_of_text(search):
    for ends in ((), (7,)):
        made = Aded(Target(TARGET.model, end_ids=frozenset(ends)), AdedParameters(search=search))
        made.end(request([5, 6, 7, 8, 9]))
        assert made.propose(request([5, 6], 1), 9).tokens == ([7] if ends else [7, 8, 9])
