"""Token Recycling: the published tree, look-ups, the ordered update, who shares a matrix, the file it is kept in."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from hasten import SamplingParams, UserError
from hasten.engine import ROOT, Draft, Engine, Limits, Observation, Target
from hasten.engine.registry import parse
from hasten.methods.drafters.token_recycling import (
    PRIOR,
    RANKS,
    UNKNOWN,
    TokenRecycling,
    TokenRecyclingParameters,
    template,
)
from hasten.model import OracleModel
from helpers import CONTEXT, VOCABULARY, Scripted, same

SIZE = 60
TARGET = Target(OracleModel(lambda history: None, SIZE))
PUBLISHED = {
    "": 8,
    **{"0": 8, "1": 4, "2": 3, "3": 2, "4": 1, "5": 1, "6": 1, "7": 1},
    **{"00": 8, "01": 3, "02": 2, "03": 1, "04": 1, "05": 1, "06": 1, "07": 1},
    **{"10": 2, "11": 1, "20": 1, "30": 1, "40": 1, "50": 1},
    **{"000": 5, "001": 2, "002": 1, "003": 1, "004": 1, "010": 1, "020": 1, "100": 1, "200": 1, "300": 1},
    **{"0000": 3, "0001": 1, "0002": 1, "0010": 1, "0100": 1, "1000": 1},
    **{"00000": 2, "00010": 1},
}
"""Candidates on the path to a node, to how many children it has."""


def drafter(target: Target = TARGET, **parameters) -> TokenRecycling:
    return TokenRecycling(target, TokenRecyclingParameters(**parameters))


def a_request(tokens: list[int], number: int = 0, tenant: str = "") -> SimpleNamespace:
    return SimpleNamespace(id=number, tokens=tokens, params=SamplingParams(tenant=tenant))


def filled(recycling: TokenRecycling, seed: int = 0, known: float = 1.0) -> np.ndarray:
    """The default tenant's matrix, with random rows, some of them short."""
    rng = random.Random(seed)
    successors = recycling._default.successors
    for token in range(recycling.vocabulary):
        if rng.random() < known:
            count = recycling.candidates if rng.random() < known else rng.randrange(recycling.candidates)
            successors[token, :count] = rng.sample(range(recycling.vocabulary), count)
    return successors


def see(recycling: TokenRecycling, request: SimpleNamespace, draft: Draft, path: list[int], own: int, seed: int = 0):
    """A verification with random logits, which this returns as NumPy: [root and nodes, vocabulary]."""
    logits = torch.randn(len(draft) + 1, recycling.vocabulary, generator=torch.Generator().manual_seed(seed))
    came = [*(draft.tokens[node] for node in path), own]
    request.tokens += came
    recycling.observe(request, Observation(draft, path, came, logits, {}))
    return logits.numpy()


# The tree


def test_the_published_tree():
    paths = template()
    assert len(paths) == len(set(paths)) == 80
    assert set(paths) == {
        (*map(int, parent), rank) for parent, children in PUBLISHED.items() for rank in range(children)
    }
    assert [sum(len(path) == depth for path in paths) for depth in range(1, 7)] == [8, 21, 25, 15, 8, 3]


def test_every_prefix_is_closed_and_holds_the_most_useful_nodes():
    paths = template()
    worth = [np.prod([RANKS[rank] for rank in path]) for path in paths]
    assert worth == sorted(worth, reverse=True)
    for node, path in enumerate(paths):
        assert path[:-1] in {(), *paths[:node]}
        assert path[-1] == 0 or (*path[:-1], path[-1] - 1) in paths[:node]


def test_fewer_candidates_than_the_tree_has():
    assert set(template(3)) == {path for path in template() if max(path) < 3}
    assert template(1) == [(0,) * depth for depth in range(1, 7)]
    assert len(drafter(candidates=2, nodes=28).tree.parents) == len(template(2)) == 28


# Drafts


def by_walking(successors: np.ndarray, root: int, nodes: int) -> tuple[list[int], list[int]]:
    """Tokens and parents, each node by itself; unknown ones, and all below them, are left out."""
    tokens, parents, number = [], [], {(): (ROOT, root)}
    for path in template()[:nodes]:
        above = number.get(path[:-1])
        if above is not None and successors[above[1], path[-1]] != UNKNOWN:
            number[path] = len(tokens), int(successors[above[1], path[-1]])
            tokens.append(number[path][1])
            parents.append(above[0])
    return tokens, parents


@pytest.mark.parametrize("known", [1.0, 0.8, 0.3])
@pytest.mark.parametrize("nodes", [1, 16, 80])
def test_tree_of_look_ups(nodes, known):
    recycling = drafter(nodes=nodes)
    successors = filled(recycling, nodes, known)
    sizes = set()
    for root in range(SIZE):
        draft = recycling.propose(a_request([3, root]), 128)
        assert (draft.tokens, draft.parents) == by_walking(successors, root, nodes)
        assert len(draft.estimates) == len(draft)
        for children in draft.children().values():
            assert len({draft.tokens[child] for child in children}) == len(children)
        sizes.add(len(draft))
        if draft.mask() is not None:
            seen = [{ROOT}, *({ROOT, *draft.path(node)} for node in range(len(draft)))]
            wanted = [[other in each for other in range(-1, len(draft))] for each in seen]
            assert draft.mask().tolist() == wanted
    assert sizes == {nodes} if known == 1 else len(sizes) > 1


def test_nothing_is_known_at_first():
    assert len(drafter(warm_prompt=False).propose(a_request([5]), 80)) == 0


def test_budget_takes_the_most_useful_nodes():
    recycling = drafter(nodes=80)
    filled(recycling)
    whole = recycling.propose(a_request([7]), 80)
    for budget in (0, 1, 5, 79, 200):
        part = recycling.propose(a_request([7]), budget)
        assert part.tokens == whole.tokens[:budget]
        assert part.parents == whole.parents[:budget]


# The update


def test_all_verified_rows_are_kept():
    recycling = drafter(warm_prompt=False)
    request = a_request([1, 2, 3])
    draft = Draft([10, 11, 12, 13], [ROOT, ROOT, 0, 2])
    logits = see(recycling, request, draft, [0], 40)
    successors = recycling._default.successors
    for row, token in enumerate([3, 10, 11, 12, 13]):
        assert successors[token].tolist() == np.argsort(-logits[row])[:8].tolist()
    assert sorted(np.flatnonzero(successors[:, 0] != UNKNOWN)) == [3, 10, 11, 12, 13]
    # The next root was not verified yet, but what was is looked up.
    request.tokens.append(3)
    assert recycling.propose(request, 80).tokens[0] == np.argmax(logits[0])


@pytest.mark.parametrize("path", [[], [0], [2, 3, 4, 5]])
def test_a_token_in_several_nodes_keeps_the_last_row(path):
    draft = Draft([10, 10, 11, 10, 11, 3], [ROOT, 0, ROOT, 2, 3, 4])
    recycling = drafter(warm_prompt=False)
    logits = see(recycling, a_request([3]), draft, path, 40)
    for token, row in {10: 4, 11: 5, 3: 6}.items():
        assert recycling._default.successors[token].tolist() == np.argsort(-logits[row])[:8].tolist()


def test_vocabulary_smaller_than_the_tree_is_wide():
    recycling = drafter(Target(OracleModel(lambda history: None, 3)), nodes=16)
    see(recycling, a_request([1]), Draft(), [], 2)
    draft = recycling.propose(a_request([1]), 80)
    assert sorted(draft.tokens[child] for child in draft.children()[ROOT]) == [0, 1, 2]


# The prompt


def test_prompt_goes_in_front_of_what_is_known():
    recycling = drafter(candidates=3)
    successors = recycling._default.successors
    successors[[5, 9, 10]] = [[30, 6, 31], [8, 32, UNKNOWN], [33, 34, 35]]
    recycling.begin(a_request([5, 6, 5, 7, 5, 7, 9, 8, 5]))
    # The latest successor first, none twice, then what was known.
    assert successors[5].tolist() == [7, 6, 30]
    assert successors[7].tolist() == [9, 5, UNKNOWN]
    assert successors[6].tolist() == [5, UNKNOWN, UNKNOWN]
    assert successors[9].tolist() == [8, 32, UNKNOWN]
    assert successors[10].tolist() == [33, 34, 35]
    assert recycling.propose(a_request([7]), 80).tokens[:2] == [9, 8]
    cold = drafter(warm_prompt=False)
    cold.begin(a_request([5, 6, 5, 7]))
    assert (cold._default.successors == UNKNOWN).all()


@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=12), min_size=1, max_size=4))
def test_rows_of_any_prompts(prompts):
    """Known candidates stand first, none twice; they are the latest prompt's, then those of the prompts before."""
    recycling = drafter(candidates=4)
    known: dict[int, list[int]] = {}
    for prompt in prompts:
        recycling.begin(a_request(prompt))
        for token in range(7):
            own = [prompt[at + 1] for at in range(len(prompt) - 1) if prompt[at] == token]
            known[token] = list(dict.fromkeys([*own[::-1], *known.get(token, [])]))[:4]
    for token, row in known.items():
        assert recycling._default.successors[token].tolist() == row + [UNKNOWN] * (4 - len(row))


# Estimates


def test_estimates_are_those_of_the_tree_at_first():
    recycling = drafter(nodes=80)
    filled(recycling)
    draft = recycling.propose(a_request([7]), 80)
    assert draft.estimates == pytest.approx([np.prod([RANKS[rank] for rank in path]) for path in template()])


def test_estimates_count_what_came():
    recycling = drafter(nodes=6, warm_prompt=False)
    paths = template()[:6]
    successors = filled(recycling)
    rng = random.Random(1)
    tried, right = dict.fromkeys(paths, 0), dict.fromkeys(paths, 0)
    for _ in range(200):
        request = a_request([rng.randrange(SIZE)])
        draft = recycling.propose(request, 80)
        tokens, came, at = dict(zip(paths, draft.tokens, strict=True)), [], request.tokens[-1]
        for _ in range(rng.randrange(1, 4)):
            at = int(successors[at, rng.choice([0, 0, 0, 1])])
            came.append(at)
        for path in paths:
            line = [tokens[path[:depth]] for depth in range(1, len(path) + 1)]
            # What goes on behind all that came was neither right nor wrong.
            if len(line) > len(came) and line[: len(came)] == came:
                continue
            tried[path] += 1
            right[path] += line == came[: len(line)]
        # Whoever's draft was verified: here none was, and the rows stay as they are.
        request.tokens += came
        recycling._judge(recycling._default, recycling._proposals.pop(0), came)
    wanted = [(PRIOR * np.prod([RANKS[rank] for rank in path]) + right[path]) / (PRIOR + tried[path]) for path in paths]
    for node, path in enumerate(paths):
        if len(path) > 1:
            wanted[node] = min(wanted[node], wanted[paths.index(path[:-1])])
    draft = recycling.propose(a_request([7]), 80)
    assert draft.estimates == pytest.approx(wanted)
    assert draft.estimates[0] > 0.6


def test_a_proposal_of_an_earlier_step_is_not_judged():
    """`auto` may leave out a verification, and then show the next one, of a draft that another drafter made."""
    recycling = drafter(nodes=1, warm_prompt=False)
    recycling._default.successors[5, 0] = 6
    request = a_request([5])
    assert recycling.propose(request, 9).tokens == [6]
    request.tokens.append(6)
    see(recycling, request, Draft.chain([9]), [], 7)
    assert recycling._default.tried == [PRIOR]


def test_a_proposal_is_judged_once():
    recycling = drafter(nodes=1, warm_prompt=False)
    successors = filled(recycling)
    request = a_request([7])
    recycling.propose(request, 80)
    see(recycling, request, Draft(), [], int(successors[7, 0]))
    assert recycling._default.tried == [PRIOR + 1]
    see(recycling, request, Draft(), [], 3)
    assert recycling._default.tried == [PRIOR + 1]


# Who shares


def test_tenants_are_apart_and_the_least_recent_is_forgotten():
    recycling = drafter(warm_prompt=False, tenants=2)
    see(recycling, a_request([7]), Draft(), [], 3)
    known = []
    for tenant in "abacab":
        known.append(len(recycling.propose(a_request([7], tenant=tenant), 80)) > 0)
        see(recycling, a_request([7], tenant=tenant), Draft(), [], 3)
    assert known == [False, False, True, False, True, False]
    assert set(recycling._tenants) == {"a", "b"}
    assert recycling.memory_bytes == 3 * recycling._default.bytes


def test_private_matrices_die_with_their_requests():
    recycling = drafter(shared=False)
    one, other = a_request([1, 2, 1]), a_request([1], number=1)
    recycling.begin(one)
    assert recycling.propose(one, 1).tokens == [2]
    assert recycling.propose(other, 1).tokens == []
    assert recycling.memory_bytes == 3 * recycling._default.bytes
    for request in (one, other, other):
        recycling.end(request)
    assert recycling.memory_bytes == recycling._default.bytes
    assert recycling._proposals == {}


# Decoding

PROMPTS = [[number * 13 % 140 + 2 for number in range(1, length)] for length in (2, 40, 7, 23, 61, 12)]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("nodes", [16, 80])
@pytest.mark.parametrize("state", ["cold", "hot", "random"])
def test_output_is_plain_decodings(llm, state, nodes, temperature):
    asked = SamplingParams(max_tokens=20, temperature=temperature, seed=5)
    expected = llm.generate(PROMPTS, asked, "plain")
    recycling = drafter(llm.engine.target, nodes=nodes)
    if state == "random":
        filled(recycling, known=0.9)
    if state == "hot":
        llm.generate(PROMPTS, asked, recycling)
    got = llm.generate(PROMPTS, asked, recycling)
    for mine, theirs in zip(got, expected, strict=True):
        same(mine.choices[0], theirs.choices[0])
    assert sum(each.choices[0].statistics.proposed for each in got) > 0
    if state == "hot" and not temperature:
        assert sum(each.choices[0].statistics.accepted for each in got) > 10


def test_runs_are_reproducible(llm):
    asked = SamplingParams(max_tokens=30, temperature=0.7, seed=5)
    matrices, figures = [], []
    for _ in range(2):
        recycling = drafter(llm.engine.target, nodes=40)
        got = llm.generate(PROMPTS, asked, recycling)
        matrices.append(recycling._default.successors)
        figures.append([each.choices[0].statistics.accepted_per_step for each in got])
    assert (matrices[0] == matrices[1]).all()
    assert (matrices[0][:VOCABULARY, 0] != UNKNOWN).sum() > 50
    assert figures[0] == figures[1]


def test_rows_of_other_drafters_are_recycled(llm):
    """Before a copying drafter, or behind it: every verified row is seen."""
    draft = Draft([10, 11, 12], [ROOT, 0, ROOT])
    asked = SamplingParams(max_tokens=20)
    engine = Engine(llm.model, llm.tokenizer, folder=str(llm.folder))
    recycling = drafter(engine.target, warm_prompt=False)
    script = Scripted(lambda request: draft)
    script.observe = recycling.observe
    (request,) = engine.add([5, 6], asked, script)
    for _ in range(2):
        engine.step()
    assert set(np.flatnonzero(recycling._default.successors[:, 0] != UNKNOWN)) >= {6, 10, 11, 12}
    engine.abort(request)
    expected = llm.generate(PROMPTS, asked, "plain")
    for spec in ("ngram+token-recycling", "token-recycling+ngram"):
        for mine, theirs in zip(llm.generate(PROMPTS, asked, spec), expected, strict=True):
            same(mine.choices[0], theirs.choices[0])


@pytest.mark.parametrize("nodes", [1, 6, 16, 80])
def test_a_first_order_language_is_known_after_one_visit(nodes):
    """Its successors do not depend on anything else, so a tree of depth d gives d + 1 tokens per step."""
    cycle = random.Random(3).sample(range(SIZE), SIZE)
    following = {token: cycle[(place + 1) % SIZE] for place, token in enumerate(cycle)}

    def law(history: tuple[int, ...]) -> torch.Tensor:
        logits = torch.zeros(SIZE)
        logits[following[history[-1]]] = 3.0
        return logits

    engine = Engine(OracleModel(law, SIZE))
    recycling = drafter(engine.target, nodes=nodes, warm_prompt=False)
    depth = max(len(path) for path in template()[:nodes] if not any(path))
    count = 12 * (depth + 1)
    accepted = []
    for budget in (SIZE + 1, count + 1):
        (request,) = engine.add([cycle[0]], SamplingParams(max_tokens=budget), recycling)
        for _ in engine.run():
            pass
        accepted.append(request.statistics.accepted_per_step[1:])
    # The first time around every token is new; the one behind the verified ones has no row yet.
    assert sum(accepted[0]) == 0
    assert accepted[1][:-1] == [depth] * (len(accepted[1]) - 1)
    assert len(accepted[1]) >= 11


def test_a_full_context(llm):
    prompt = [7] * (CONTEXT - 10)
    asked = SamplingParams(ignore_eos=True)
    expected = llm.generate([prompt], asked, "plain")[0].choices[0]
    same(llm.generate([prompt], asked, "token-recycling:nodes=80")[0].choices[0], expected)


def test_more_requests_than_places(llm):
    engine = Engine(llm.model, llm.tokenizer, llm.engine.end_ids, Limits(sequences=2))
    asked = SamplingParams(max_tokens=10)
    requests = [engine.add(prompt, asked, "token-recycling:shared=false")[0] for prompt in PROMPTS]
    for _ in engine.run():
        pass
    recycling = engine.drafter("token-recycling:shared=false")[1]
    assert recycling._private == recycling._proposals == {}
    assert [each.output for each in requests] == [each.token_ids for each in llm.generate(PROMPTS, asked, "plain")]


# The file


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "matrix.safetensors"


def test_a_matrix_is_kept(store):
    first = drafter(store=str(store))
    request = a_request([1, 2, 3])
    first.begin(request)
    see(first, request, Draft([10, 11], [ROOT, 0]), [], 4)
    first.end(request)
    assert [file.name for file in store.parent.iterdir()] == [store.name]
    second = drafter(store=str(store))
    assert (second._default.successors == first._default.successors).all()
    assert second.propose(a_request([3]), 80).tokens == first.propose(a_request([3]), 80).tokens != []
    # It goes on learning.
    see(second, a_request([20]), Draft(), [], 4)
    second.end(request)
    assert drafter(store=str(store))._default.successors[20, 0] != UNKNOWN


def test_named_tenants_are_not_kept(store):
    recycling = drafter(store=str(store))
    request = a_request([1, 2, 3], tenant="a")
    recycling.begin(request)
    see(recycling, request, Draft(), [], 4)
    recycling.end(request)
    assert not store.exists()
    recycling.end(a_request([1]))
    assert (load_file(store)["successors"] == UNKNOWN).all()


def test_decoding_goes_on_where_nothing_can_be_kept(store):
    recycling = drafter(store=str(store))
    store.mkdir()
    (store / "occupied").touch()
    with pytest.warns(RuntimeWarning, match=r"matrix\.safetensors is no longer kept"):
        recycling.end(a_request([1]))
    recycling.end(a_request([1]))
    assert [file.name for file in store.parent.iterdir()] == [store.name]


def test_stores_that_do_not_fit(store):
    def told(sentence: str, **parameters) -> None:
        with pytest.raises(UserError, match=f"token-recycling: .*{sentence}"):
            drafter(**{"store": str(store), **parameters})

    told("there is no folder .*/nowhere to keep file in", store=str(store.parent / "nowhere" / "file"))
    drafter(store=str(store), candidates=4).end(a_request([1]))
    told("holds 4 candidates for each of 60 tokens; this model and method have 8 for each of 60")
    store.unlink()
    drafter(Target(OracleModel(lambda history: None, 61)), store=str(store)).end(a_request([1]))
    told("holds 8 candidates for each of 61 tokens; this model and method have 8 for each of 60")
    for wrong in (
        np.zeros((SIZE + 1, 8), dtype=np.int32),
        np.full((SIZE + 1, 8), -2, dtype=np.int32),
        np.full((SIZE + 1, 8), SIZE, dtype=np.int32),
    ):
        save_file({"successors": wrong}, store)
        told("is damaged")
    for tensors in ({"successors": np.zeros((3, 3))}, {"successors": np.zeros(3, dtype=np.int32)}, {"other": wrong}):
        save_file(tensors, store)
        told("is not a store of this method")
    store.write_bytes(store.read_bytes()[:20])
    told("is not a store of this method")
    store.unlink()
    store.mkdir()
    told("is not a store of this method")


# Refusals


@pytest.mark.parametrize(
    "given, told",
    [
        ("nodes=0", "nodes must be between 1 and 80"),
        ("nodes=81", "nodes must be between 1 and 80"),
        ("candidates=0", "candidates must be between 1 and 8"),
        ("candidates=9", "candidates must be between 1 and 8"),
        ("tenants=0", "tenants must be between 1 and 4096"),
        ("tenants=5000", "tenants must be between 1 and 4096"),
        ("store=x,shared=false", "a store needs shared=true"),
    ],
)
def test_refusals(given, told):
    with pytest.raises(UserError, match=f"token-recycling: {told}"):
        parse(f"token-recycling:{given}")
