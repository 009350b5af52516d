"""Blend: its three sources, what they are weighed by, the tree it grows, and what is kept of whom."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hasten import SamplingParams
from hasten.engine import Draft, Engine, Observation, Target
from hasten.errors import UserError
from hasten.methods.drafters import blend
from hasten.methods.drafters.blend import PAIR, RESPONSES, ROWS, UNNAMED, Blend, BlendParameters, Case, start_of
from hasten.model import OracleModel

SIZE = 100
TARGET = Target(OracleModel(lambda history: None, SIZE))


def make(**parameters: Any) -> Blend:
    return Blend(TARGET, BlendParameters(**parameters))


def request(number: int, tokens: Sequence[int], tenant: str = "") -> Any:
    params = SamplingParams(tenant=tenant)
    return SimpleNamespace(id=number, tokens=list(tokens), prompt_length=len(tokens), params=params)


def logits(*rows: dict[int, float]) -> torch.Tensor:
    table = torch.full((len(rows), SIZE), -9.0)
    for number, row in enumerate(rows):
        for token, value in row.items():
            table[number, token] = value
    return table


def verify(drafter: Blend, asked: Any, draft: Draft, path: list[int], token: int, *rows: dict[int, float]) -> None:
    """Commit a path and one token more; rows that are not given say nothing in particular."""
    came = [*(draft.tokens[node] for node in path), token]
    asked.tokens += came
    shown = logits(*rows) if rows else torch.zeros(len(draft) + 1, SIZE)
    drafter.observe(asked, Observation(draft, path, came, shown, {}))


def paths(draft: Draft) -> list[list[int]]:
    return [[draft.tokens[each] for each in draft.path(node)] for node in range(len(draft))]


# Sources


def test_the_own_text_goes_on_as_before():
    draft = make(least=0.3).propose(request(0, [7, 8, 9, 10, 11, 12, 7, 8, 9]), 64)
    assert draft.tokens[:2] == [10, 11] and draft.is_chain
    assert draft.estimates == sorted(draft.estimates, reverse=True)


def test_responses_of_the_tenant_are_gone_on_with_where_enough_agrees():
    drafter = make()
    first = request(0, [1, 2, 3])
    drafter.propose(first, 64)
    first.tokens += [40, 41, 42, 43, 44, 45]
    drafter.end(first)
    long, short = request(1, [90, 40, 41, 42, 43]), request(2, [90, 42, 43])
    assert drafter.propose(long, 64).tokens[:2] == [44, 45]
    assert drafter.propose(short, 64).tokens == []
    assert drafter.propose(request(3, long.tokens, tenant="other"), 64).tokens == []
    assert make(max_requests=0).propose(request(1, long.tokens), 64).tokens == []


def test_runners_up_are_drafted_behind_the_last_two_tokens_or_the_last():
    drafter = make(least=0.05)
    asked = request(0, [1, 2])
    verify(drafter, asked, drafter.propose(asked, 64), [], 50, {50: 9.0, 60: 8.9, 61: 8.8})
    behind_both, behind_one, behind_none = (drafter.propose(request(9, tokens), 64) for tokens in ([1, 2], [5, 2], [5]))
    assert {50, 60, 61} <= {path[0] for path in paths(behind_both)}
    assert {50, 60} <= {path[0] for path in paths(behind_one)} and not behind_none
    assert behind_both.estimates[0] > behind_one.estimates[0]


def test_rows_of_rejected_nodes_are_kept():
    drafter = make()
    asked = request(0, [1, 2])
    drafter.propose(asked, 64)
    verify(drafter, asked, Draft.chain([30, 31]), [], 50, {50: 9.0}, {70: 9.0}, {71: 9.0})
    assert drafter.propose(request(1, [2, 30]), 64).tokens[0] == 70
    assert drafter.propose(request(2, [30, 31]), 64).tokens[0] == 71


# Weights


def test_cases_start_with_what_sources_say():
    """Longer matches, larger shares, longer contexts and leads are better, and two sources than one."""
    text = [16 * length + 12 + 1 for length in range(1, 8)]
    assert sorted(map(start_of, text)) == list(map(start_of, text))
    assert start_of(16 * 3 + 4 + 1) < start_of(16 * 3 + 12 + 1)
    likeliest, sure = ROWS * 8, ROWS * (8 + 4)
    assert start_of(likeliest) < start_of(sure) < start_of(sure + ROWS * PAIR)
    assert start_of(sure + text[3]) > max(start_of(sure), start_of(text[3]))
    assert start_of(RESPONSES * text[3] + ROWS * UNNAMED) < start_of(RESPONSES * text[3]) < start_of(text[3])


def test_a_case_learns_and_forgets():
    case = Case(0.5)
    for _ in range(400):
        case.learn(False)
    assert case.right / case.tried < 0.02
    for _ in range(400):
        case.learn(True)
    assert case.right / case.tried > 0.7


def test_what_is_wrong_time_and_again_is_no_longer_drafted():
    """Two tokens come again and again, and behind them always another one: such matches are worth nothing here."""
    drafter, asked, drafts = make(least=0.15), request(0, [5, 6, 7]), []
    for fresh in range(10, 90):
        for token in (5, 6, fresh):
            drafts.append(drafter.propose(asked, 64))
            verify(drafter, asked, Draft(), [], token)
    behind = drafts[2::3]
    assert behind[0] and not behind[-1]
    # Behind the first of the two, the second is sure.
    assert drafts[-2].tokens[0] == 6 and drafts[-2].estimates[0] > 0.8


def test_all_that_was_said_on_the_way_is_judged_though_it_was_not_verified():
    drafter = make()
    asked = request(0, [7, 8, 9, 10, 7, 8])
    assert drafter.propose(asked, 64).tokens[0] == 9
    tried = sum(case.tried for case in drafter._memories[""].cases.values())
    verify(drafter, asked, Draft(), [], 9)
    assert sum(case.tried for case in drafter._memories[""].cases.values()) > tried


def test_a_proposal_of_an_earlier_step_is_not_judged():
    drafter = make()
    asked = request(0, [7, 8, 9, 10, 7, 8])
    drafter.propose(asked, 64)
    cases = drafter._memories[""].cases
    tried = sum(case.tried for case in cases.values())
    asked.tokens.append(9)
    verify(drafter, asked, Draft(), [], 10)
    assert sum(case.tried for case in cases.values()) == tried


# Trees


@pytest.mark.parametrize("seed", range(5))
def test_trees_are_sound(seed):
    """Parents first, siblings differ, no child likelier than its parent, siblings together no surer than sure."""
    rng = random.Random(seed)
    drafter = make(least=0.02, nodes=24)
    asked = request(0, [rng.randrange(6) for _ in range(40)])
    for _ in range(60):
        draft = drafter.propose(asked, 20)
        assert len(draft) <= 20 and len(draft.estimates) == len(draft)
        for node, parent in enumerate(draft.parents):
            assert parent < node
            assert draft.estimates[node] <= (1.0 if parent < 0 else draft.estimates[parent])
        for nodes in draft.children().values():
            assert len({draft.tokens[node] for node in nodes}) == len(nodes)
        roots = [draft.estimates[node] for node in draft.children().get(-1, [])]
        assert sum(roots) <= 0.98 + 1e-9
        table = torch.randn(len(draft) + 1, SIZE)
        token = rng.randrange(6)
        asked.tokens.append(token)
        drafter.observe(asked, Observation(draft, [], [token], table, {}))


def test_embedded_tokens_are_never_drafted():
    draft = make().propose(request(0, [7, 8, -1, 9, 7, 8]), 64)
    assert -1 not in draft.tokens
    assert make().propose(request(0, [-1]), 64).tokens == []


def test_a_budget_of_nothing():
    assert not make().propose(request(0, [7, 8, 9, 7, 8]), 0)


# What is kept


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(blend, "ENTRIES", 64)
    monkeypatch.setattr(blend, "TENANTS", 3)
    rng = random.Random(1)
    drafter = make(max_requests=5)
    for number in range(40):
        asked = request(number, [rng.randrange(SIZE) for _ in range(20)], tenant=str(number % 7))
        for _ in range(6):
            draft = drafter.propose(asked, 64)
            token = rng.randrange(SIZE)
            asked.tokens.append(token)
            drafter.observe(asked, Observation(draft, [], [token], torch.randn(len(draft) + 1, SIZE), {}))
        drafter.end(asked)
    assert len(drafter._memories) == 3
    assert all(len(memory._rows) <= 64 for memory in drafter._memories.values())
    assert drafter.memory_bytes < 500_000
    assert not drafter._trees and not drafter._texts.running


def test_tokens_are_those_of_plain_decoding_and_a_second_answer_is_faster(llm):
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    prompts = [[2, 3, 4] * 4, list(range(10, 30))]
    expected = [generation.token_ids for generation in llm.generate(prompts, params, "plain")]
    engine = Engine(llm.model, llm.tokenizer, llm.engine.end_ids)
    drafter = Blend(engine.target, BlendParameters())
    steps = []
    for _ in range(2):
        requests = [engine.add(prompt, params, drafter)[0] for prompt in prompts]
        list(engine.run())
        assert [each.output for each in requests] == expected
        steps.append(sum(each.statistics.steps for each in requests))
    assert steps[1] < steps[0]


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"nodes": 0}, "nodes must be between 1 and 128"),
        ({"nodes": 129}, "nodes must be between 1 and 128"),
        ({"least": 0.0}, "least must be"),
        ({"least": 1.0}, "least must be"),
        ({"max_requests": -1}, "max_requests must not be negative"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_bad_parameters(parameters, sentence):
    with pytest.raises(UserError, match=f"^blend: {sentence}"):
        BlendParameters(**parameters)
