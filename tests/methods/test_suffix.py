"""SuffixDecoding: drafts are those of the definition, stores are kept apart, bounded and on disk, and it pays."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from counting import Counts, speculate

from hasten import LLM, SamplingParams
from hasten.engine import Draft, Engine, Target, creation
from hasten.errors import UserError
from hasten.methods.drafters.suffix import NOTHING, Speculator, Suffix, SuffixParameters
from hasten.methods.drafters.suffix_index import SuffixIndex
from hasten.model import OracleModel
from helpers import make_tokenizer

TARGET = Target(OracleModel(lambda history: None, 100))


def make(**parameters: Any) -> Suffix:
    return Suffix(TARGET, SuffixParameters(**parameters))


def request(number: int, tokens: Sequence[int], prompt: int, tenant: str = "") -> Any:
    params = SimpleNamespace(tenant=tenant)
    return SimpleNamespace(id=number, tokens=list(tokens), prompt_length=prompt, params=params)


def finish(drafter: Suffix, number: int, prompt: Sequence[int], response: Sequence[int], tenant: str = "") -> None:
    """A request from beginning to end."""
    asked = request(number, prompt, len(prompt), tenant)
    drafter.propose(asked, 16)
    asked.tokens += response
    drafter.end(asked)


def propose(tokens: Sequence[int], budget: int = 64, **parameters: Any) -> Draft:
    """A single request's draft."""
    drafter = make(**parameters)
    asked = request(0, tokens, len(tokens))
    draft = drafter.propose(asked, budget)
    drafter.end(asked)
    return draft


# Drafts


@pytest.mark.parametrize("tree", [False, True])
def test_known_drafts(tree):
    """Once seen before gives 1/2, since the occurrence that is being continued counts too."""
    draft = propose([7, 8, 9, 10, 11, 12, 13, 7, 8, 9], depth=24, tree=tree)
    assert draft == Draft.chain([10, 11, 12], [0.5] * 3)
    draft = propose([7, 8, 9, 10, 11, 12, 13, 7, 8, 9], depth=24, tree=tree, factor=4)
    assert draft == Draft.chain([10, 11, 12, 13, 7, 8, 9], [0.5] * 7)
    draft = propose([1, 2, 3, 4, 1, 2, 3, 5, 1, 2], depth=24, factor=1)
    assert draft == Draft.chain([3, 4], [2 / 3, 1 / 3])
    assert propose([1, 2, 3, 4, 5, 6], tree=tree) == Draft()
    assert propose([1], tree=tree) == Draft()


def test_tree_takes_the_likeliest_nodes():
    text = [1, 2, 3, 4, 1, 2, 3, 5, 1, 2]
    draft = propose(text, tree=True, factor=2)
    assert (draft.tokens, draft.parents) == ([3, 4, 5, 1], [-1, 0, 0, 1])
    assert draft.estimates == [2 / 3, 1 / 3, 1 / 3, 1 / 3]
    assert propose(text, tree=True, factor=2, min_probability=0.34).tokens == [3]


def test_bounds_of_a_draft():
    text = list(range(20)) * 4
    assert len(propose(text)) == 16
    assert len(propose(text, length=5)) == 5
    assert len(propose(text, budget=3)) == 3
    assert len(propose(text, budget=0)) == 0
    assert len(propose(text, depth=8)) == 4  # four tokens matched, four drafted
    assert len(propose(text, depth=8, offset=2)) == 5
    assert len(propose(text, factor=0)) == 0
    assert len(propose(text, factor=0, offset=3)) == 3
    assert len(propose(text, min_probability=1)) == 0


def test_score_decides():
    """[1, 2] was followed by 3 twice, with the own tail 2/3 each; below the minimum nothing is proposed."""
    text = [1, 2, 3, 9, 1, 2, 3, 8, 1, 2]
    assert propose(text, minimum_score=1.0) == Draft.chain([3, 9], [2 / 3, 1 / 3])
    assert propose(text, minimum_score=1.01) == Draft()


def of_responses(texts: Sequence[Sequence[int]], context: Sequence[int], **parameters: Any) -> Draft:
    """The draft from texts that the context itself is not among."""
    chosen = SuffixParameters(**parameters)
    index = SuffixIndex(chosen.depth)
    for tokens in texts:
        index.extend(index.add(), tokens)
    return Speculator(chosen)(index, context, 64, NOTHING).draft


def test_least_probability_is_allowed():
    """7 of 100 is 0.07, though 0.07 * 100 is more than 7 in floating point."""
    texts = [[1, 2]] * 7 + [[1, 3]] * 93
    assert of_responses(texts, [1], tree=True, offset=1, min_probability=0.07).tokens == [3, 2]
    assert of_responses(texts, [1], tree=True, offset=1, min_probability=0.071).tokens == [3]


def test_longer_match_among_equal_trees():
    """Four tokens matched leave room for [12] on the third level; six, with the same score, for [21] on the second."""
    match = [1, 2, 3, 4, 5, 6]
    ends = [[10, 11, 12]] * 2 + [[10, 11]] * 2 + [[10]] + [[20, 21]] * 2 + [[20]]
    chosen = {"tree": True, "length": 4, "min_probability": 0.0}
    draft = of_responses([match + end for end in ends], match, depth=8, **chosen)
    assert (draft.tokens, draft.parents) == ([10, 11, 20, 21], [-1, 0, -1, 2])
    draft = of_responses([match + end for end in ends], match, depth=10, **chosen)
    assert (draft.tokens, draft.parents) == ([10, 11, 20, 12], [-1, 0, -1, 1])


def test_longer_match_among_equals():
    """[1, 2] says 5 (1/2), [2] says 6 (2/4): both may draft one token."""
    text = [1, 2, 5, 0, 2, 6, 0, 2, 6, 0, 1, 2]
    assert propose(text, factor=0, offset=1) == Draft.chain([5], [0.5])
    assert propose([4, *text[:-2], 9, 2], factor=0, offset=1).tokens == [6]


def test_own_text_among_equals():
    drafter = make()
    finish(drafter, 0, [50], [1, 2, 7, 0])
    finish(drafter, 1, [50], [1, 2, 8, 0])
    # Both stores give 1/2: the prompt has 3 behind [1, 2] once, the responses 7 and 8.
    assert drafter.propose(request(2, [1, 2, 3, 4, 1, 2], 6), 16) == Draft.chain([3, 4], [0.5, 0.5])
    # With another response the shared count of 7 is 2/3.
    finish(drafter, 3, [50], [1, 2, 7, 0])
    assert drafter.propose(request(4, [1, 2, 3, 4, 1, 2], 6), 16) == Draft.chain([7, 0], [2 / 3, 2 / 3])


@pytest.mark.parametrize("tree", [False, True])
def test_drafts_of_the_definition(tree):
    """Ten thousand contexts, linear and tree together, over stores that grow and shrink: the same drafts and scores."""
    checked = drafted = deep = 0
    for seed in range(170):
        rng = random.Random(seed)
        depth = rng.choice([2, 3, 5, 8, 8, 16])
        minimum = rng.choice(["0", "0.05", "0.1", "0.1", "0.3"])
        settings = {
            "length": rng.choice([1, 3, 8, 16]),
            "factor": rng.choice([0.0, 0.5, 1.0, 1.0, 2.0, 4.0]),
            "offset": rng.choice([-1.0, 0.0, 0.0, 0.3, 2.0]),
        }
        speculator = Speculator(SuffixParameters(depth=depth, min_probability=float(minimum), tree=tree, **settings))
        index, counts = SuffixIndex(depth), Counts(depth)
        alphabet = rng.choice([2, 2, 3, 5, 12, 50])
        motif = [rng.randrange(alphabet) for _ in range(12)]
        for _ in range(10):
            live = list(counts.sequences)
            if len(live) > 3 or (live and rng.random() < 0.2):
                gone = rng.choice(live)
                index.remove(gone)
                counts.remove(gone)
            tokens = (motif * 2)[rng.randrange(12) :] if rng.random() < 0.6 else []
            tokens += [rng.randrange(alphabet) for _ in range(rng.randrange(8))]
            number = index.add()
            assert counts.add() == number
            index.extend(number, tokens)
            counts.extend(number, tokens)
            for _ in range(3):
                text = counts.sequences[rng.choice(list(counts.sequences))]
                text = text[: rng.randrange(len(text) + 1)] + motif[: rng.randrange(6)]
                expected = speculate(counts, text, minimum=Fraction(minimum), tree=tree, **settings)
                context = text[len(text) - max(0, min(depth, len(text)) - 1) :]
                got = speculator(index, context, 64, NOTHING)
                assert got.draft == Draft(
                    expected.tokens, expected.parents, estimates=[float(p) for p in expected.probabilities]
                )
                assert got.score == float(expected.score)
                assert speculator(index, context, 64, got) is got  # only a higher score replaces what there is
                checked += 1
                drafted += len(expected.tokens) > 0
                deep += expected.match + settings["length"] > depth
    assert checked >= 5000
    assert drafted > checked // 2
    assert deep > 500


# Requests and stores


def test_responses_are_shared_and_prompts_are_not():
    drafter = make()
    finish(drafter, 0, [1, 2, 3, 4], [5, 6, 7, 8])
    assert drafter.propose(request(1, [9, 5, 6], 3), 16) == Draft.chain([7, 8], [1, 1])
    assert drafter.propose(request(2, [9, 2, 3], 3), 16) == Draft()
    assert make(max_requests=0).propose(request(1, [9, 5, 6], 3), 16) == Draft()


def test_responses_are_shared_while_they_grow():
    drafter = make()
    first, second = request(0, [1, 2, 3], 1), request(1, [9, 2], 2)
    drafter.observe(first, None)
    assert drafter.propose(second, 16).tokens == [3]
    first.tokens += [4]
    drafter.observe(first, None)
    assert drafter.propose(request(2, [9, 2, 3], 3), 16).tokens == [4]


def test_tenants_are_apart():
    drafter = make()
    finish(drafter, 0, [1], [5, 6, 7, 8], tenant="a")
    assert drafter.propose(request(1, [9, 5, 6], 3, "a"), 16).tokens == [7, 8]
    assert drafter.propose(request(2, [9, 5, 6], 3, "b"), 16) == Draft()
    assert drafter.propose(request(3, [9, 5, 6], 3), 16) == Draft()


def test_oldest_finished_responses_are_forgotten():
    drafter = make(max_requests=3)
    growing = request(100, [1, 60, 61, 62], 1)
    drafter.observe(growing, None)
    responses = [[10 * number + step for step in range(4)] for number in range(5)]

    def known() -> list[int]:
        """The responses that are still looked up, by a request that leaves nothing behind."""
        index = drafter.store.index("")
        return [number for number, tokens in enumerate(responses) if list(index.matches(tokens[:2]))]

    for number, tokens in enumerate(responses):
        finish(drafter, number, [1], tokens)
        assert known() == list(range(max(0, number - 1), number + 1))
        assert len(drafter.store) <= 3
    # The oldest of all is still growing: it stays, until it is finished and the next one comes.
    assert list(drafter.store.index("").matches([60, 61]))
    drafter.end(growing)
    finish(drafter, 5, [1], [90, 91])
    assert not list(drafter.store.index("").matches([60, 61]))
    assert known() == [3, 4]


def test_long_responses_are_bounded_by_their_tokens(tmp_path):
    """Of any length and tenant, the oldest first; the file does not keep what memory forgot."""
    path = tmp_path / "responses"
    drafter = make(max_tokens=1000, store=str(path))
    for number in range(60):
        finish(drafter, number, [1], [number] * 300, tenant="ab"[number % 2])
        assert len(drafter.store) <= 3 and drafter.memory_bytes < 200_000
        assert len(responses(path)) <= 2 * (3 + 1)
    assert not list(drafter.store.index("a").matches([56, 56])) and list(drafter.store.index("a").matches([58, 58]))
    # One that is longer than all may be is forgotten with the rest.
    finish(drafter, 60, [1], [70] * 2000)
    assert len(drafter.store) == 0 and drafter.store._held == 0


def test_nothing_stays_of_a_request_but_its_response():
    drafter = make(max_requests=2)
    for number in range(40):
        finish(drafter, number, range(30), [number, number + 1, number + 2], tenant=f"tenant {number}")
    assert drafter._texts.running == {}
    assert len(drafter.store) == len(drafter.store._indices) == 2
    assert 0 < drafter.memory_bytes < 4000
    # Requests that end without a token, whether they began or not, leave nothing at all.
    drafter.end(request(50, [1, 2], 2))
    finish(drafter, 51, [1, 2], [], tenant="silent")
    assert drafter.store.index("silent") is None
    assert drafter._texts.running == {}


# The file


def responses(path: Path) -> list[tuple[str, list[int]]]:
    return [(entry["tenant"], entry["tokens"]) for entry in map(json.loads, path.read_text().splitlines()[1:])]


def test_store_is_kept(tmp_path):
    path = tmp_path / "responses"
    drafter = make(store=str(path))
    finish(drafter, 0, [1], [5, 6, 7, 8], tenant="Ä\n")
    finish(drafter, 1, [1], [15, 16, 17])
    finish(drafter, 2, [1], [])
    assert responses(path) == [("Ä\n", [5, 6, 7, 8]), ("", [15, 16, 17])]
    assert path.stat().st_mode & 0o077 == 0
    again = make(store=str(path))
    assert again.propose(request(0, [9, 5, 6], 3, "Ä\n"), 16).tokens == [7, 8]
    assert again.propose(request(1, [9, 5, 6], 3), 16) == Draft()
    assert again.propose(request(2, [9, 15, 16], 3), 16).tokens == [17]
    assert responses(path) == [("Ä\n", [5, 6, 7, 8]), ("", [15, 16, 17])]
    assert os.listdir(tmp_path) == ["responses"]


def test_store_forgets_too(tmp_path):
    path = tmp_path / "responses"
    drafter = make(store=str(path), max_requests=3)
    for number in range(20):
        finish(drafter, number, [1], [number, number + 1])
        assert responses(path)[-1] == ("", [number, number + 1])
        assert len(responses(path)) <= 6
    assert len(make(store=str(path), max_requests=100).store) == len(responses(path)) >= 3
    assert len(make(store=str(path), max_requests=3).store) == 3
    assert responses(path) == [("", [number, number + 1]) for number in (17, 18, 19)]


def test_interrupted_write_loses_one_response(tmp_path):
    path = tmp_path / "responses"
    drafter = make(store=str(path))
    finish(drafter, 0, [1], [5, 6, 7, 8])
    finish(drafter, 1, [1], [15, 16, 17])
    path.write_text(path.read_text()[:-4])
    drafter = make(store=str(path))
    finish(drafter, 2, [1], [25, 26])
    assert responses(path) == [("", [5, 6, 7, 8]), ("", [25, 26])]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a store"),
        (b"some text\n", "not a store"),
        (b"[1, 2]\n", "not a store"),
        (b'{"format": "something else"}\n', "not a store"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b'HEADER\n{"tenant":"","tokens":[1,2\n', "damaged in line 2"),
        (b'HEADER\n{"tenant":"","tokens":[1,2]}\n{"tenant":"","tokens":[100]}\n', "damaged in line 3"),
        (b'HEADER\n{"tenant":"","tokens":[-1]}\n', "damaged in line 2"),
        (b'HEADER\n{"tenant":"","tokens":[true]}\n', "damaged in line 2"),
        (b'HEADER\n{"tenant":7,"tokens":[1]}\n', "damaged in line 2"),
        (b'HEADER\n{"tokens":[1]}\n', "damaged in line 2"),
        (b"HEADER\n[]\n\n", "damaged in line 2"),
    ],
)
def test_bad_stores(tmp_path, content, said):
    path = tmp_path / "responses"
    make(store=str(path))
    content = content.replace(b"HEADER", path.read_bytes().strip())
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        make(store=str(path))
    assert path.read_bytes() == content


def test_store_of_another_model(tmp_path):
    path = str(tmp_path / "responses")
    make(store=path)
    larger = Target(OracleModel(lambda history: None, 101))
    with_tokenizer = Target(TARGET.model, make_tokenizer())
    for other in (larger, with_tokenizer):
        with pytest.raises(UserError, match="other tokens"):
            Suffix(other, SuffixParameters(store=path))
    make(store=path)


def test_store_out_of_reach(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        make(store=str(tmp_path))
    with pytest.raises(UserError, match="cannot be written"):
        make(store=str(tmp_path / "nowhere" / "responses"))


def test_store_that_vanishes_is_told_once(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    drafter = make(store=str(folder / "responses"))
    (folder / "responses").unlink()
    folder.rmdir()
    with pytest.warns(UserWarning, match="no longer written"):
        finish(drafter, 0, [1], [5, 6, 7])
    finish(drafter, 1, [1], [15, 16, 17])
    assert drafter.propose(request(2, [9, 5, 6], 3), 16).tokens == [7]


@pytest.mark.parametrize(
    "spec",
    [
        "depth=1",
        "length=0",
        "factor=-1",
        "factor=nan",
        "offset=inf",
        "min_probability=1.5",
        "minimum_score=-1",
        "max_requests=-1",
        "max_requests=0,store=x",
    ],
)
def test_out_of_range(spec):
    with pytest.raises(UserError, match=r"^suffix: "):
        creation.create(f"suffix:{spec}", TARGET)


# What it is worth


def run(engine: Engine, spec: str, prompt: list[int], **settings: Any) -> tuple[list[int], int]:
    """Output and steps."""
    asked = engine.add(prompt, SamplingParams(max_tokens=40, ignore_eos=True, **settings), spec)[0]
    for _ in engine.run():
        pass
    return asked.output, asked.statistics.steps


@pytest.mark.parametrize("tree", ["false", "true"])
def test_pays_on_answers_that_repeat(llm: LLM, tree):
    """The second time a question is asked, the answer costs a few steps; not so for another tenant."""
    engine = Engine(llm.model)
    spec, alone = f"suffix:tree={tree}", f"suffix:tree={tree},max_requests=0"
    for seed in range(3):
        prompt = [random.Random(seed).randrange(2, 150) for _ in range(12)]
        plain, _ = run(engine, "plain", prompt, seed=seed, temperature=0.7)
        steps = []
        for tenant in ("a", "a", "b"):
            output, taken = run(engine, spec, prompt, seed=seed, temperature=0.7, tenant=tenant)
            assert output == plain
            steps.append(taken)
        _, without = run(engine, alone, prompt, seed=seed, temperature=0.7)
        cold, warm, other = steps
        assert warm <= 12
        assert warm <= 0.6 * min(cold, without, other)
    assert engine.drafter(spec)[1]._texts.running == {}


def test_leaves_poor_drafts_to_the_next(llm: LLM):
    """In a composition the other drafter speaks until the score is reached, and both stay whole."""
    prompt = [5, 6, 7, 8] * 3
    both, suffix, ngram = "suffix:minimum_score=4+ngram:length=2", "suffix:minimum_score=4", "ngram:length=2"
    engine = Engine(llm.model)
    proposed: dict[str, list[int]] = {spec: [] for spec in (both, suffix, ngram)}
    for spec, counts in proposed.items():
        _, drafter = engine.drafter(spec)
        ask = drafter.propose_all

        def counted(requests: Any, budgets: Any, ask: Any = ask, counts: list[int] = counts) -> list[Draft]:
            drafts = ask(requests, budgets)
            counts += map(len, drafts)
            return drafts

        drafter.propose_all = counted
        first, _ = run(engine, spec, prompt)
        again, _ = run(engine, spec, prompt)
        assert first == again == run(engine, "plain", prompt)[0]
    assert set(proposed[ngram]) <= {0, 2}
    assert all(size == 0 or size >= 4 for size in proposed[suffix])
    assert 2 in proposed[both]
    assert max(proposed[both]) >= 4
