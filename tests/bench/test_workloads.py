"""The suites: the same every time, held out, within the context, and as redundant as they claim."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from hasten import LLM
from hasten.bench import workloads
from hasten.bench.prompts import BenchPrompt
from hasten.bench.suite import SUITES, load_suite
from hasten.tasks import CATEGORIES, TASKS, prose_chunks, split_of

CONTEXT = 1024


@pytest.fixture(scope="module")
def suites() -> dict[str, list[BenchPrompt]]:
    return {name: load_suite(name, 2) for name in SUITES}


def test_tasks_and_their_parts():
    whole = load_suite("tasks", 2)
    assert len(whole) == 2 * len(TASKS) and {item.category for item in whole} == set(CATEGORIES)
    assert {item.task for item in load_suite("copy", 3)} == {"copy"}
    assert all(item.grade is not None for item in whole)


@pytest.mark.parametrize("name", ["tasks", "spec", "agent"])
def test_a_suite_is_the_same_every_time(name: str):
    assert [item.prompt for item in load_suite(name, 1)] == [item.prompt for item in load_suite(name, 1)]


def test_every_question_is_held_out(suites: dict[str, list[BenchPrompt]]):
    chunks = set(prose_chunks("test", workloads.PROSE_CHARACTERS))
    for item in itertools.chain(*suites.values()):
        if item.task == "prose":
            assert item.prompt in chunks
            continue
        assert split_of(item.prompt) == "test"


def test_prompts_fit_into_the_context(suites: dict[str, list[BenchPrompt]]):
    """An answer is no longer than the last question, twice over."""
    tokenizer = LLM("tiny").tokenizer
    for item in itertools.chain(*suites.values()):
        assert len(tokenizer(item.prompt)["input_ids"]) < CONTEXT * 2 // 3


def test_spec_has_spec_benchs_categories(suites: dict[str, list[BenchPrompt]]):
    count = Counter(item.category for item in suites["spec"])
    assert count == dict.fromkeys(("multi-turn", "translation", "summarisation", "qa", "math", "retrieval"), 2)
    assert all(item.grade is not None for item in suites["spec"])


def test_redundant_prompts_come_with_controls(suites: dict[str, list[BenchPrompt]]):
    items = suites["redundant"]
    assert len(items) == 2 * 2 * len(workloads.VARIATIONS)
    assert [item.category for item in items] == ["redundant", "control"] * (len(items) // 2)
    assert {item.task for item in items[1::2]} <= set(workloads.UNRELATED)


def test_a_redundant_answer_is_a_variation_of_the_first_one():
    """The second turn quotes the first answer, and most words of its own answer stand there, though it is another."""
    rng = random.Random(1)
    for first_turn, variation in workloads.VARIATIONS:
        said = repeated = 0
        for _ in range(4):
            first, second = workloads.conversation(first_turn, variation, rng)
            assert first.answer.strip() in second.prompt and second.answer.strip() != first.answer.strip()
            assert TASKS[second.task].grade(second, second.answer)
            words, old = second.answer.split(), set(first.answer.split())
            said, repeated = said + len(words), repeated + sum(word in old for word in words)
        assert repeated > 0.8 * said


def test_agent_sessions_share_their_tables_and_files(suites: dict[str, list[BenchPrompt]]):
    items = suites["agent"]
    assert [item.category for item in items[:8]] == ["extract"] * 2 + ["query"] * 3 + ["patch"] * 3
    session = [item.prompt.split("\n") for item in items[:8]]
    assert session[2][0] == session[3][0] == session[4][0]
    assert session[2] != session[3]
    for before, after in itertools.pairwise(items[5:8]):
        text = after.prompt.partition("\n")[2].partition("\nChange: ")[0]
        assert before.grade is not None and before.grade(text), "a patch starts from what the one before it left"


def test_prose_has_no_right_answer(suites: dict[str, list[BenchPrompt]]):
    assert {item.category for item in suites["prose"]} == {"prose"}
    assert all(item.grade is None for item in suites["prose"])
    assert len({item.prompt for item in suites["prose"]}) == 2
