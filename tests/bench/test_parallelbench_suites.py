"""ParallelBench as suites: which questions, on which words, with room for every answer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from hasten import LLM, SamplingParams, UserError
from hasten.bench.conversation import encode
from hasten.bench.parallelbench import parallelbench, single_token_words
from hasten.bench.suite import load_suite
from hasten.tasks.parallelbench import OPERATIONS, PARALLELBENCH, SEVERAL_ANSWERS
from hasten.tasks.words import ALL_WORDS
from helpers import make_tokenizer


@pytest.fixture(scope="module")
def shipped() -> LLM:
    return LLM("tiny")


def test_parts_go_by_name():
    everything = load_suite("parallelbench", 1)
    assert [prompt.category for prompt in everything] == list(PARALLELBENCH)
    for name, tasks in (
        ("sudoku_n4_12,copy,copy", ["sudoku_n4_12", "copy"]),
        ("puzzles", ["latin_square_n4", "sudoku_n4_12"]),
    ):
        assert [prompt.task for prompt in load_suite(f"parallelbench:{name}", 1)] == tasks
    assert {prompt.task for prompt in load_suite("parallelbench-words:random", 2)} == SEVERAL_ANSWERS
    assert {prompt.task for prompt in load_suite("parallelbench-n15:shuffle", 2)} == {"shuffle_n15"}
    with pytest.raises(UserError, match=r"no part 'sudoko'.*lists, random, writing, puzzles, copy"):
        load_suite("parallelbench:sudoko")
    with pytest.raises(
        UserError, match="parallelbench-words has no part 'writing'; its parts are: lists, random, copy"
    ):
        load_suite("parallelbench-words:writing")


def test_prompts_are_spread_over_the_sizes():
    sizes = Counter(len(prompt.question.problem.items) for prompt in load_suite("parallelbench-words:copy", 8))
    assert sizes == {3: 2, 4: 2, 5: 2, 6: 2}
    assert len(load_suite("parallelbench-words:copy", 1000)) == 100


def test_words_are_one_token_each_and_answers_fit(shipped: LLM):
    words = single_token_words(shipped.tokenizer)
    assert set(words) <= set(ALL_WORDS) and len(words) > 32
    for prompt in parallelbench("parallelbench-words", 8, shipped.tokenizer):
        problem = prompt.question.problem
        assert len(shipped.tokenizer(" " + prompt.question.answer)["input_ids"]) == problem.length
        assert prompt.max_tokens == 8 and prompt.grade(" " + prompt.question.answer) == 1
    for prompt in parallelbench("parallelbench:copy,sudoku_n4_12,paraphrase", 4, shipped.tokenizer):
        needed = len(shipped.tokenizer(" " + prompt.question.answer)["input_ids"]) + 1
        assert needed <= prompt.max_tokens and prompt.max_tokens & (prompt.max_tokens - 1) == 0


def test_a_tokenizer_that_knows_none_of_our_words_gives_its_own():
    tokenizer = make_tokenizer()
    words = single_token_words(tokenizer)
    for word in words:
        assert len(tokenizer("a " + word)["input_ids"]) == len(tokenizer("a")["input_ids"]) + 1
    assert "the" in words and not set(words) <= set(ALL_WORDS)


def test_a_tokenizer_of_few_words_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hasten.bench.parallelbench.single_token_words", lambda tokenizer: ["red", "cat"])
    with pytest.raises(UserError, match="needs 8 words of one token each, and this tokenizer has 2"):
        parallelbench("parallelbench-words", 1, make_tokenizer())


def test_the_example_goes_through_the_chat_template(llm: LLM):
    (prompt,) = parallelbench("parallelbench:copy", 1, llm.tokenizer)
    shown, answer = prompt.question.example
    (ids,) = encode(llm, [prompt], SamplingParams())
    text = llm.tokenizer.decode(ids)
    assert text == f"user: {shown}\nassistant: {answer}\nuser: {prompt.question.prompt}\nassistant:"
    (ids,) = encode(llm, [replace(prompt, question=None)], SamplingParams())
    assert llm.tokenizer.decode(ids) == prompt.question.text


def test_operations_are_all_there():
    assert [prompt.task for prompt in load_suite("parallelbench-words", 1)] == list(OPERATIONS)
