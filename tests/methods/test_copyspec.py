"""CopySpec: what is copied from where, that the table is the one built from scratch, what mistakes teach it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten import SamplingParams, UserError
from hasten.engine import Draft, Engine, Target
from hasten.engine.registry import parse
from hasten.methods.drafters.copyspec import BAN, CANDIDATES, CONTEXT, CopySpec, CopySpecParameters
from hasten.model import OracleModel
from helpers import same

MODEL = OracleModel(lambda history: None, 100)
POLICIES = ["first", "last", "longest"]
SPECIAL = 9


def drafter(tokenizer=None, **parameters) -> CopySpec:
    return CopySpec(Target(MODEL, tokenizer), CopySpecParameters(**parameters))


def a_request(tokens: list[int], number: int = 0) -> SimpleNamespace:
    return SimpleNamespace(id=number, tokens=tokens)


def propose(tokens: list[int], budget: int = 64, **parameters) -> list[int]:
    draft = drafter(**parameters).propose(a_request(tokens), budget)
    assert draft == Draft.chain(draft.tokens, draft.estimates)
    assert len(draft.estimates) == len(draft)
    return draft.tokens


def from_scratch(tokens: list[int], gamma: int) -> dict[tuple[int, ...], list[int]]:
    """Every run of gamma tokens that something follows, to the positions of what follows."""
    table: dict[tuple[int, ...], list[int]] = {}
    for start in range(len(tokens) - gamma):
        table.setdefault(tuple(tokens[start : start + gamma]), []).append(start + gamma)
    return table


def by_search(tokens: list[int], gamma: int, length: int, policy: str) -> list[int]:
    """The definition, without a table: which earlier occurrence is meant, and the text from there on."""
    found = [
        at
        for at in range(gamma, len(tokens))
        if len(tokens) >= gamma and tokens[at - gamma : at] == tokens[len(tokens) - gamma :]
    ]
    if not found:
        return []

    def agreement(at: int) -> int:
        left = 0
        while left < min(at, CONTEXT + gamma) and tokens[at - 1 - left] == tokens[-1 - left]:
            left += 1
        return left

    if policy == "longest":
        at = max(found[-CANDIDATES:], key=lambda each: (agreement(each), each))
    else:
        at = found[0 if policy == "first" else -1]
    known = list(tokens)
    for step in range(length):
        known.append(known[at + step])
    return known[len(tokens) :]


# What is copied


def test_what_followed_is_copied():
    assert propose([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], length=2) == [4, 5]
    assert propose([1, 2, 3, 4, 5, 6, 7, 8, 2, 3]) == []
    assert propose([1, 2, 3, 4, 5, 6, 7, 8, 2, 3], gamma=2, length=3) == [4, 5, 6]


@pytest.mark.parametrize("tokens", [[1], [1, 2], [1, 1], [1, 2, 3], [1, 1, 1]])
def test_a_context_without_a_repetition(tokens):
    """Shorter than the key, or just as long: a query never finds itself."""
    assert propose(tokens, gamma=3) == []


def test_which_occurrence():
    tokens = [0, 2, 3, 7, 5, 2, 3, 8, 6, 2, 3, 7, 5, 2, 3]
    assert propose(tokens, gamma=2, length=1, occurrence="first") == [7]
    assert propose(tokens, gamma=2, length=2, occurrence="last") == [7, 5]
    assert propose(tokens, gamma=2, length=1, occurrence="longest") == [8]
    # Of occurrences that agree equally far the latest is taken.
    assert propose([1, 2, 7, 1, 2, 8, 5, 1, 2], gamma=2, length=1) == [8]


def test_loops_are_copied_whole():
    assert propose([9, 5, 5, 5, 5], length=6) == [5] * 6
    assert propose([1, 2, 3, 1, 2, 3, 1, 2, 3], length=8) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_budget():
    assert propose([1, 2, 3, 4, 5, 1, 2, 3], budget=2) == [4, 5]
    assert propose([1, 2, 3, 4, 5, 1, 2, 3], budget=0) == []


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(1, 12),
    st.sampled_from(POLICIES),
)
def test_table_and_choice_are_those_of_the_definition(steps, gamma, length, policy):
    """Tokens arrive a few at a time, as they are accepted."""
    copyspec = drafter(gamma=gamma, length=length, occurrence=policy, retry=True)
    request = a_request([])
    for step in steps:
        request.tokens += step
        assert copyspec.propose(request, 64).tokens == by_search(request.tokens, gamma, length, policy)
        assert copyspec._memories[0].table == from_scratch(request.tokens, gamma)


def test_left_context_is_compared_among_the_latest_occurrences():
    """A lookup costs the same however often the key has occurred."""
    tokens = [*([5, 1, 2, 7] * 3), *([6, 1, 2, 8] * (CANDIDATES - 1)), 5, 1, 2]
    assert propose(tokens, gamma=2, length=1) == [7]
    assert propose([*([5, 1, 2, 7] * 3), *([6, 1, 2, 8] * CANDIDATES), 5, 1, 2], gamma=2, length=1) == [8]


def test_a_block_ends_behind_a_special_token():
    tokenizer = SimpleNamespace(
        added_tokens_decoder={SPECIAL: SimpleNamespace(special=True), 4: SimpleNamespace(special=False)}
    )
    tokens = [1, 2, 3, 4, 5, SPECIAL, 6, 7, 1, 2, 3]
    assert drafter(tokenizer).propose(a_request(tokens), 64).tokens == [4, 5, SPECIAL]
    assert drafter().propose(a_request(tokens), 64).tokens == [4, 5, SPECIAL, 6, 7, 1, 2, 3, 4, 5]


# What is learned from mistakes


def after(copyspec: CopySpec, request: SimpleNamespace, came: list[int]) -> list[int]:
    """The next draft, once these tokens have come."""
    request.tokens += came
    return copyspec.propose(request, 64).tokens


@pytest.mark.parametrize("policy", POLICIES)
def test_a_wrong_position_is_not_proposed_again(policy):
    request = a_request([1, 2, 3, 4, 4, 1, 2, 3])
    copyspec = drafter(length=2, occurrence=policy)
    assert copyspec.propose(request, 64).tokens == [4, 4]
    # The other occurrence, which is the first one's correction.
    assert after(copyspec, request, [5, 6, 1, 2, 3]) == [5, 6]
    # Wrong as well: nothing is left but what has just come.
    assert after(copyspec, request, [7, 8, 1, 2, 3]) == [7, 8]
    assert set(copyspec._memories[0].wrong) == {3, 8}


def test_positions_may_be_tried_again():
    request = a_request([1, 2, 3, 4, 4, 1, 2, 3])
    copyspec = drafter(length=2, occurrence="first", retry=True)
    assert copyspec.propose(request, 64).tokens == [4, 4]
    assert after(copyspec, request, [5, 6, 1, 2, 3]) == [4, 4]


def test_a_wrong_position_comes_back():
    """A text that changed may change again: after a while the position is proposed as if nothing had been."""
    copyspec, request = drafter(gamma=1, length=2, occurrence="first"), a_request([1, 2, 3, 1])
    assert copyspec.propose(request, 9).tokens == [2, 3]
    request.tokens += [9, 1]
    assert copyspec.propose(request, 9).tokens == [9, 1]
    request.tokens += [*range(100, 100 + BAN), 1]
    assert copyspec.propose(request, 9).tokens == [2, 3]
    assert not copyspec._memories[0].wrong


@pytest.mark.parametrize("occurrence", ["first", "last", "longest"])
def test_failures_do_not_make_lookups_longer(occurrence):
    """However many copies were wrong, the positions that a lookup passes over are bounded."""

    class Watched(dict):
        asked = 0

        def __contains__(self, key):
            self.asked += 1
            return super().__contains__(key)

    copyspec, request = drafter(gamma=1, length=1, occurrence=occurrence), a_request([1, 2])
    copyspec.propose(request, 1)
    memory = copyspec._memories[0]
    memory.wrong = Watched(memory.wrong)
    # Every 1 is followed by a token that never came before.
    for token in range(3, 3 + 6 * BAN):
        request.tokens += [1]
        memory.wrong.asked = 0
        copyspec.propose(request, 1)
        assert memory.wrong.asked <= BAN + CANDIDATES + 1
        request.tokens += [token]
    assert len(memory.wrong) <= BAN


def test_a_copy_that_was_right_at_first_is_not_wrong():
    request = a_request([1, 2, 3, 4, 4, 1, 2, 3])
    copyspec = drafter(length=2, occurrence="first")
    assert copyspec.propose(request, 64).tokens == [4, 4]
    assert after(copyspec, request, [4, 6, 1, 2, 3]) == [4, 4]


def test_blocks_grow_while_they_are_right():
    text = list(range(10, 90))
    request = a_request([1, 2, 3, *text, 0, 1, 2, 3])
    copyspec = drafter(length=3, limit=10)
    place, lengths = 0, []
    for _ in range(5):
        block = copyspec.propose(request, 64).tokens
        assert block == text[place : place + len(block)]
        lengths.append(len(block))
        place += len(block) + 1
        request.tokens += text[place - len(block) - 1 : place]
    assert lengths == [3, 6, 10, 10, 10]
    # One that breaks off starts the growth again; one that was cut before it was verified does not.
    block = copyspec.propose(request, 64).tokens
    assert after(copyspec, request, block[:4]) == text[place + 4 : place + 14]
    assert len(after(copyspec, request, [0, 1, 2, 3])) == 3


def test_blocks_keep_their_length_by_default():
    request = a_request([1, 2, 3, *range(10, 90), 0, 1, 2, 3])
    copyspec = drafter(length=3)
    assert copyspec.propose(request, 64).tokens == [10, 11, 12]
    assert after(copyspec, request, [10, 11, 12, 13]) == [14, 15, 16]


def test_estimates_follow_the_record():
    copyspec, request = drafter(length=4), a_request([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3])
    draft = copyspec.propose(request, 64)
    assert draft.estimates == pytest.approx([0.75 * 0.9**step for step in range(4)])
    # One of one copies began well; two further tokens were right, then one was not.
    request.tokens += [4, 5, 6, 0, 1, 2, 3]
    draft = copyspec.propose(request, 64)
    first, rate = (4 * 0.75 + 1) / 5, (4 * 0.9 + 2) / 7
    assert draft.estimates == pytest.approx([first * rate**step for step in range(4)])
    # Not judged: nothing has come since.
    assert copyspec.propose(request, 64).estimates == draft.estimates
    request.tokens += [0, 1, 2, 3]
    draft = copyspec.propose(request, 64)
    assert draft.estimates[0] == pytest.approx((4 * 0.75 + 1) / 6)


# Requests


def test_requests_are_apart_and_forgotten():
    copyspec = drafter(gamma=2)
    one, other = a_request([1, 2, 3, 1, 2]), a_request([1, 2, 4, 1, 2], number=1)
    assert copyspec.memory_bytes == 0
    assert copyspec.propose(one, 1).tokens == [3]
    assert copyspec.propose(other, 1).tokens == [4]
    one.tokens += [3, 1, 2]
    assert copyspec.propose(one, 1).tokens == [3]
    assert copyspec.memory_bytes > 0
    for number in (0, 1, 1):
        copyspec.end(SimpleNamespace(id=number))
    assert copyspec.memory_bytes == 0


PROMPTS = [[5, 6, 7], [3], [8, 9] * 8, [4] * 12, [12, 13, 14] * 5, list(range(2, 60))]


@pytest.mark.parametrize("temperature", [0.0, 0.4])
@pytest.mark.parametrize("gamma, length", [(2, 1), (3, 10), (5, 40)])
def test_table_in_decoding(llm, gamma, length, temperature):
    """After every step of a batch: the table of everything committed; in the end: plain decoding's tokens."""
    asked = SamplingParams(max_tokens=24, temperature=temperature, seed=4)
    expected = llm.generate(PROMPTS, asked, "plain")
    prompts = [[*PROMPTS[n], *expected[n].token_ids, *PROMPTS[n]] for n in range(len(PROMPTS))]
    expected = llm.generate(prompts, asked, "plain")
    engine = Engine(llm.model, llm.tokenizer, llm.engine.end_ids)
    copyspec = CopySpec(engine.target, CopySpecParameters(gamma=gamma, length=length))
    requests = [engine.add(prompt, asked, copyspec)[0] for prompt in prompts]
    checked = 0
    while engine.busy:
        engine.step()
        for request in requests:
            memory = copyspec._memories.get(request.id)
            if memory is not None:
                assert memory.table == from_scratch(request.tokens[: memory.indexed], gamma)
                checked += 1
    assert checked > 20
    assert [request.output for request in requests] == [each.token_ids for each in expected]
    assert sum(request.statistics.accepted for request in requests) > 10
    assert copyspec._memories == {}


def test_model_where_there_is_nothing_to_copy(llm):
    """With a draft model behind it, which catches up on the tokens that were copied."""
    prompts = [*PROMPTS[2:5], [*PROMPTS[0], *range(20, 40), *PROMPTS[0]]]
    for temperature in (0.0, 0.9):
        asked = SamplingParams(max_tokens=20, temperature=temperature, seed=2)
        expected = llm.generate(prompts, asked, "plain")
        steps = {}
        for spec in ("copyspec:gamma=2", "draft-model", "copyspec:gamma=2+draft-model"):
            got = llm.generate(prompts, asked, spec)
            for mine, theirs in zip(got, expected, strict=True):
                same(mine.choices[0], theirs.choices[0])
            steps[spec] = sum(each.choices[0].steps for each in got)
        assert steps["copyspec:gamma=2+draft-model"] < steps["copyspec:gamma=2"]


def test_pays_on_repetition(llm):
    """A text that was seen before costs a step per block."""
    asked = SamplingParams(max_tokens=33, ignore_eos=True)
    first = llm.generate([[5, 6, 7]], asked, "plain")[0]
    prompt = [5, 6, 7, *first.token_ids, 5, 6, 7]
    expected = llm.generate([prompt], asked, "plain")[0]
    got = llm.generate([prompt], asked, "copyspec")[0]
    assert got.token_ids == expected.token_ids
    assert got.choices[0].steps < expected.choices[0].steps


# Refusals


@pytest.mark.parametrize(
    "given, told",
    [
        ("gamma=0", "gamma must be between 1 and 16"),
        ("gamma=17", "gamma must be between 1 and 16"),
        ("length=0", "length must be between 1 and 64"),
        ("length=65", "length must be between 1 and 64"),
        ("limit=9", "limit must be 0 or between length and 128"),
        ("limit=129", "limit must be 0 or between length and 128"),
        ("limit=-1", "limit must be 0 or between length and 128"),
        ("occurrence=middle", "occurrence must be one of first, last, longest, not 'middle'"),
    ],
)
def test_refusals(given, told):
    with pytest.raises(UserError, match=f"copyspec: {told}"):
        parse(f"copyspec:{given}")


def test_a_block_ends_behind_any_end_of_text():
    target = Target(MODEL, end_ids=frozenset({7, 8}))
    drafter = CopySpec(target, CopySpecParameters(gamma=1))
    request = SimpleNamespace(id=0, tokens=[1, 5, 8, 6, 2, 1])
    assert drafter.propose(request, 9).tokens == [5, 8]
