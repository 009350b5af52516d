"""Every task: the same examples from the same seed, apart by split, within the context, graded soundly."""

from __future__ import annotations

import random
import re

import pytest

from hasten.tasks import CATEGORIES, TASKS, Example, Split, examples, split_of
from hasten.tasks.words import ALL_WORDS, KEY_WORDS, LIST_WORDS

NAMES = sorted(TASKS)


def draw(name: str, split: Split = "train", count: int = 200, difficulty: float = 1.0) -> list[Example]:
    return list(examples(name, split, count, 7, difficulty))


def tokens(example: Example) -> float:
    """An estimate: one token for a word of the vocabulary, else one for 2.5 characters."""
    text = example.prompt + example.answer
    words = [word for word in re.findall(r" [a-z]+\b", text) if word[1:] in ALL_WORDS]
    return len(words) + (len(text) - sum(map(len, words))) / 2.5


def test_vocabularies_are_distinct() -> None:
    assert len(LIST_WORDS) == 64 and len(KEY_WORDS) == 96
    assert len(set(ALL_WORDS)) == 160


def test_every_category_has_a_task() -> None:
    assert {task.category for task in TASKS.values()} == set(CATEGORIES)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_examples(name: str) -> None:
    assert draw(name, count=20) == draw(name, count=20)
    assert draw(name, count=20) != list(examples(name, "train", 20, 8))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("difficulty", [0.05, 1.0])
def test_splits_are_disjoint(name: str, difficulty: float) -> None:
    train = {example.prompt for example in draw(name, "train", 50, difficulty)}
    test = {example.prompt for example in draw(name, "test", 10, difficulty)}
    assert not train & test
    assert {split_of(prompt) for prompt in train} == {"train"}
    assert {split_of(prompt) for prompt in test} == {"test"}


@pytest.mark.parametrize("name", NAMES)
def test_form_variety_and_length(name: str) -> None:
    drawn = draw(name)
    assert all(example.prompt.endswith("\nAnswer:") and example.task == name for example in drawn)
    assert all(example.answer[0] == "\n" for example in drawn if "\n" in example.answer)
    assert all(example.answer[0] in " \n" and example.answer.strip() for example in drawn)
    assert len({example.prompt for example in drawn}) > 0.8 * len(drawn)
    sizes = sorted(map(tokens, drawn))
    assert sizes[-1] < 1000
    assert sizes[int(0.95 * len(sizes))] < 512


@pytest.mark.parametrize("name", NAMES)
def test_difficulty_caps_the_length(name: str) -> None:
    easy, full = (sum(map(tokens, draw(name, count=100, difficulty=d))) for d in (0.1, 1.0))
    assert easy <= full


@pytest.mark.parametrize("name", NAMES)
def test_grader_accepts_the_reference_and_rejects_a_corrupted_answer(name: str) -> None:
    task = TASKS[name]
    for example in draw(name, count=15):
        assert task.grade(example, example.answer)
        assert task.grade(example, example.answer + "\n")
        assert not task.grade(example, "")
        assert not task.grade(example, example.answer[:-2])
        assert not task.grade(example, example.answer + " 7 x")


def test_arithmetic_steps_are_true() -> None:
    for name in ("addition", "subtraction", "multiplication"):
        for example in draw(name, count=100):
            for left, right in re.findall(r"([\d+*-]+)=(\d+)", example.answer):
                numbers = [int(number) for number in re.findall(r"\d+", left)]
                first, second, carry = numbers
                expected = {
                    "addition": first + second + carry,
                    "subtraction": first - second - carry,
                    "multiplication": first * second + carry,
                }[name]
                assert expected == int(right)


def test_several_right_answers() -> None:
    shuffle = next(examples("shuffle", "train", 1, 0))
    items = list(shuffle.meta["items"])
    assert TASKS["shuffle"].grade(shuffle, " ".join(items[::-1]))
    assert not TASKS["shuffle"].grade(shuffle, " ".join(items))
    assert not TASKS["shuffle"].grade(shuffle, " ".join(items[:-1] + items[:1]))

    # Both completions of two rows and columns that may be swapped.
    latin = Example("latin", "", "", {"givens": ((0, 0, 3), (0, 0, 3)[::-1], (0, 3, 0))})
    assert TASKS["latin"].grade(latin, "123\n312\n231")
    assert TASKS["latin"].grade(latin, "213\n321\n132")
    assert not TASKS["latin"].grade(latin, "123\n321\n231")

    people = next(examples("json", "train", 1, 0))
    assert TASKS["json"].grade(people, people.answer.replace(": ", ":"))
    assert not TASKS["json"].grade(people, "[" * 100_000)

    query = next(examples("sql", "train", 1, 0))
    assert TASKS["sql"].grade(query, query.answer.replace(";", "").replace(" ", "  "))


def test_edits_change_the_text() -> None:
    for example in draw("edit"):
        before = example.prompt.removeprefix("Text:\n").partition("\nChange:")[0]
        assert before.strip() != example.answer.strip()


def test_errors_are_clear_and_early() -> None:
    with pytest.raises(ValueError, match=r"did you mean .*reverse"):
        examples("revers", "train", 1, 0)
    with pytest.raises(ValueError, match="split"):
        examples("copy", "valid", 1, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="difficulty"):
        examples("copy", "train", 1, 0, difficulty=0)


def test_generators_take_any_source_of_chance() -> None:
    for task in TASKS.values():
        assert task.generate(random.Random(1), 0.5).task == task.name
