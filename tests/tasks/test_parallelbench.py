"""ParallelBench's questions: right answers score 1, damaged ones 0, and a seed gives the same set everywhere."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from hasten.errors import UserError
from hasten.tasks import split_of
from hasten.tasks.parallelbench import (
    OPERATIONS,
    PARALLELBENCH,
    PARALLELBENCH_N15,
    SEVERAL_ANSWERS,
    ListProblem,
    ListQuestion,
    Question,
    questions,
    score,
    word_tasks,
)
from hasten.tasks.parallelbench.base import BenchTask
from hasten.tasks.parallelbench.puzzles import LatinQuestion, SudokuQuestion, all_latin_squares
from hasten.tasks.parallelbench.vocabulary import EVERYDAY, RARE
from hasten.tasks.parallelbench.waiting_line import last_name
from hasten.tasks.parallelbench.writing import ParaphraseQuestion, SentenceQuestion, grammatical
from hasten.tasks.words import LIST_WORDS

WORDS = word_tasks(LIST_WORDS, per_size=8)
ALL = {
    **PARALLELBENCH,
    **PARALLELBENCH_N15,
    **{f"words/{name}": task for name, task in WORDS.items()},
}


@pytest.fixture(scope="module")
def sets() -> dict[str, list[Question]]:
    return {name: list(questions(task)) for name, task in ALL.items()}


def test_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs/parallelbench.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    exec(compile(code[1], "parallelbench.md", "exec"), {})


def test_there_are_17_tasks_of_the_papers_sizes(sets: dict[str, list[Question]]) -> None:
    assert len(PARALLELBENCH) == 17 and len(PARALLELBENCH_N15) == 10
    for name in PARALLELBENCH:
        assert len(sets[name]) == (108 if name == "sudoku_n4_12" else 100)
    for name in OPERATIONS:
        lengths = Counter(len(q.problem.items) for q in sets[name] if isinstance(q, ListQuestion))
        assert lengths == {3: 25, 4: 25, 5: 25, 6: 25}
        assert {len(q.problem.items) for q in sets[f"{name}_n15"] if isinstance(q, ListQuestion)} == {15}


@pytest.mark.parametrize("name", ALL)
def test_the_same_seed_gives_the_same_questions(name: str, sets: dict[str, list[Question]]) -> None:
    few = replace(ALL[name], per_size=8)
    drawn = list(questions(few))
    assert drawn == list(questions(few)) and drawn[:8] == sets[name][:8]
    assert drawn != list(questions(few, seed=1))
    train = {replace(question, example=None).text for question in questions(few, "train")}
    test = {replace(question, example=None).text for question in sets[name]}
    assert len(test) == len(sets[name]) and not test & train
    assert {split_of(prompt) for prompt in test} == {"test"} and {split_of(prompt) for prompt in train} == {"train"}


def test_the_first_questions_stay_as_they_are(sets: dict[str, list[Question]]) -> None:
    """Scores are comparable only between the same questions: change them knowingly."""
    line = 'Copy the list: ["Ben Lee", "Yara Smith", "Kate Lewis"]'
    assert sets["copy"][0].prompt == f"{line}\nWrite only the final list."
    assert sets["summarise"][0].answer == "Ida and Leo will have lunch on Tuesday at the station."


@pytest.mark.parametrize("name", ALL)
def test_right_answers_score_1(name: str, sets: dict[str, list[Question]]) -> None:
    rng = random.Random(name)
    for question in sets[name]:
        for answer in (question.answer, question.draw(rng)):
            assert question.grade(answer) == question.grade(answer, strict=True) == 1
            assert question.grade(f" {answer}\n", strict=True) == 1
        assert question.grade("") == question.grade("", strict=True) == 0
    assert score(sets[name], [question.answer for question in sets[name]], strict=True) == 100


def damaged(question: Question, rng: random.Random) -> list[str]:
    """The answer with two parts swapped, one left out, one twice, one replaced by a wrong one."""
    parts, join = parts_of(question)
    i, j = swapped(question, parts, rng)
    swap = list(parts)
    swap[i], swap[j] = swap[j], swap[i]
    k = rng.randrange(len(parts))
    wrong = "5" if isinstance(question, SudokuQuestion) else "Zed Quux"
    # In a grid in place of its neighbour: with a cell more, a line may be left out and the next ones be right.
    twice = parts[: k + 1] + parts[k:] if not is_puzzle(question) else [*parts[:k], parts[k ^ 1], *parts[k + 1 :]]
    return [join(parts) for parts in (swap, parts[:k] + parts[k + 1 :], twice, [*parts[:k], wrong, *parts[k + 1 :]])]


def is_puzzle(question: Question) -> bool:
    return isinstance(question, LatinQuestion | SudokuQuestion)


def parts_of(question: Question) -> tuple[list[str], Callable[[list[str]], str]]:
    """The items of a list, the cells of a grid or the words of a sentence, and how to join them."""
    if isinstance(question, ListQuestion):
        return question.kind.read(question.answer, strict=True) or [], question.kind.write
    if isinstance(question, LatinQuestion):
        return question.answer.replace("\n", ",").split(","), lambda cells: in_lines(cells, ",")
    if isinstance(question, SudokuQuestion):
        return list(question.answer.replace("\n", "")), lambda cells: in_lines(cells, "")
    return question.answer.split(), " ".join


def in_lines(cells: list[str], comma: str) -> str:
    return "\n".join(comma.join(cells[start : start + 4]) for start in range(0, len(cells), 4))


def swapped(question: Question, parts: list[str], rng: random.Random) -> tuple[int, int]:
    """Two parts whose swap is wrong: neighbours, of a grid in one line, but not the inserted word, which may move."""
    if isinstance(question, ListQuestion) and question.problem.operation == "insert_random":
        return parts.index(question.problem.items[0]), parts.index(question.problem.items[1])
    places = range(0, 16, 4) if is_puzzle(question) else range(len(parts) - 1)
    # "Will will" is the same either way where letters' case does not matter.
    first = rng.choice([place for place in places if parts[place].lower() != parts[place + 1].lower()])
    return first, first + 1


@pytest.mark.parametrize("name", [name for name in ALL if "shuffle" not in name])
def test_damaged_answers_score_0(name: str, sets: dict[str, list[Question]]) -> None:
    rng = random.Random(name)
    for question in sets[name]:
        for text in damaged(question, rng):
            assert question.grade(text) == question.grade(text, strict=True) == 0, text


@pytest.mark.parametrize("name", [name for name in ALL if "shuffle" in name])
def test_a_shuffled_list_has_the_same_items_in_another_order(name: str, sets: dict[str, list[Question]]) -> None:
    rng = random.Random(name)
    for question in sets[name]:
        assert isinstance(question, ListQuestion)
        write, items = question.kind.write, list(question.problem.items)
        assert question.grade(write(items)) == 0
        assert question.grade(write([items[1], items[0], *items[2:]]), strict=True) == 1
        for text in damaged(question, rng)[1:]:
            assert question.grade(text) == question.grade(text, strict=True) == 0, text


@pytest.mark.parametrize("name", ALL)
def test_lists_and_puzzles_show_one_example(name: str, sets: dict[str, list[Question]]) -> None:
    shows = not name.startswith(("words", "paraphrase", "summarise"))
    for question in sets[name]:
        roles = [message["role"] for message in question.messages]
        assert roles == (["user", "assistant", "user"] if shows else ["user"])
        assert question.messages[-1]["content"] == question.prompt
        assert question.text.endswith(f"{question.prompt}\nAnswer:")
        if question.example and isinstance(question, ListQuestion):
            asked, answered = question.example
            assert (
                asked.count('"') != question.prompt.count('"') and asked in question.text and answered in question.text
            )


def test_sort_is_by_last_name_as_asked(sets: dict[str, list[Question]]) -> None:
    for question in sets["sort"]:
        assert isinstance(question, ListQuestion) and "by last name" in question.prompt
        right = sorted(question.problem.items, key=last_name)
        assert question.grade(question.kind.write(right)) == 1
        by_first = sorted(question.problem.items)
        assert question.grade(question.kind.write(by_first)) == (by_first == right)


def test_lenient_and_strict_lists(sets: dict[str, list[Question]]) -> None:
    question = sets["copy"][0]
    inside = question.answer[1:-1]
    for text in (
        inside,
        inside.replace('"', "'"),
        f"Here [it] is: {question.answer} Done.",
        question.answer.replace('"', ""),
    ):
        assert question.grade(text) == 1 and question.grade(text, strict=True) == 0
    assert question.grade(question.answer.replace(", ", ",")) == 1
    assert question.grade(question.answer.replace(", ", ","), strict=True) == 0
    words = next(questions(WORDS["copy"]))
    assert words.grade(words.answer.replace(" ", ", ")) == 1
    assert words.grade(words.answer.replace(" ", ", "), strict=True) == 0


@pytest.mark.parametrize("operation", OPERATIONS)
def test_answers_by_definition(operation: str) -> None:
    """Against the rules of the paper's graders, over all lists of the items and one item more."""
    items, word, index = ("a", "b", "c", "d"), "w", 2
    problem = ListProblem(
        operation,
        items,
        word if "insert" in operation or "replace" in operation else None,
        index if "index" in operation else None,
    )

    def valid(answer: tuple[str, ...]) -> bool:
        match operation:
            case "copy" | "sort":
                return answer == items
            case "reverse":
                return answer == ("d", "c", "b", "a")
            case "insert_index":
                return answer == ("a", "b", "w", "c", "d")
            case "remove_index":
                return answer == ("a", "b", "d")
            case "replace_index":
                return answer == ("a", "b", "w", "d")
            case "insert_random":
                return word in answer and tuple(x for x in answer if x != word) == items
            case "remove_random":
                return len(answer) == 3 and any(answer == tuple(x for x in items if x != gone) for gone in items)
            case "replace_random":
                return (
                    len(answer) == 4 and sum(x != y for x, y in zip(answer, items, strict=True)) == 1 and word in answer
                )
        return sorted(answer) == list(items)

    expected = {a for n in range(6) for a in permutations((*items, word), n) if valid(a)}
    assert len(problem.answers()) == len(set(problem.answers()))
    assert set(problem.answers()) == expected
    assert {a for n in range(6) for a in permutations((*items, word), n) if problem.accepts(a)} == expected
    assert all(len(answer) == problem.length for answer in expected)
    rng = random.Random(0)
    drawn = Counter(problem.draw(rng) for _ in range(200 * len(expected)))
    assert set(drawn) == expected and (len(expected) > 1) == (operation in SEVERAL_ANSWERS)
    # The chi-square of even draws is about the degrees of freedom, with a variance of twice as much.
    chi_square = sum((count - 200) ** 2 / 200 for count in drawn.values())
    assert chi_square <= len(expected) - 1 + 4 * (2 * (len(expected) - 1)) ** 0.5


def test_nouns_fit_the_grammar() -> None:
    nouns = [noun for topics in (EVERYDAY, RARE) for topic in topics.values() for noun in topic]
    assert len(set(nouns)) == len(nouns) and all(noun.isalpha() and noun.islower() for noun in nouns)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("the owl and a cat need the dog near the fox", True),
        ("an owl and the dog beside a cat carry the fox", True),
        ("the owl needs the cat with a dog and the fox near the owl", True),
        ("a owl and a cat need the dog near the fox", False),
        ("the owl and a cat needs the dog near the fox", False),
        ("the owl need a cat and the dog near the fox", False),
        ("the owl needs the cat the dog near the fox", False),
        ("owl and cat need dog near fox", False),
        ("the owl and a cat need the dog near the fox and", False),
        ("the owl and a cat need the dog near the bird", False),
    ],
)
def test_grammar(text: str, right: bool) -> None:
    nouns = ("owl", "cat", "dog", "fox")
    assert grammatical(text, nouns) == right
    question = SentenceQuestion("words_to_sentence_easy", "", "", nouns)
    sentence = text.capitalize() + "."
    assert (
        question.grade(sentence, strict=True) == question.grade(text) == question.grade(f'Sure!\n"{sentence}"') == right
    )
    assert question.grade(text, strict=True) == 0


def test_words_count_as_whole_words() -> None:
    question = SentenceQuestion("words_to_sentence_easy", "", "", ("car", "scarf"))
    assert question.grade("The scarf covers the scarf.") == 0
    assert question.grade("The scarf covers the car.") == 1


def test_a_paraphrase_scores_by_what_it_changes(sets: dict[str, list[Question]]) -> None:
    for question in sets["paraphrase"]:
        assert isinstance(question, ParaphraseQuestion)
        order, verb = question.source
        grades = {form: question.grade(text) for form, text in question.forms.items()}
        assert len(set(question.forms.values())) == len(grades)
        assert grades[question.source] == 0 and question.forms[question.source] in question.prompt
        assert grades[order, 1 - verb] == grades[(order + 1) % 8, verb] == 0.5
        assert grades[(order + 1) % 8, 1 - verb] == 1


def test_summaries_state_what_was_agreed_last(sets: dict[str, list[Question]]) -> None:
    for question in sets["summarise"]:
        talk = question.prompt
        day = max(
            (talk.rfind(day), day)
            for day in ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
        )
        assert day[1] in question.answer
        assert question.grade(question.answer.replace(day[1], "Someday")) == 0


def test_puzzles(sets: dict[str, list[Question]]) -> None:
    assert len(set(all_latin_squares())) == 576  # OEIS A002860
    square = LatinQuestion("latin_square_n4", "", "", ("A", "7", "Q", "B"))
    rows = ["A,7,Q,B", "7,A,B,Q", "Q,B,A,7", "B,Q,7,A"]
    text = "\n".join(rows)
    assert square.grade(text, strict=True) == 1
    assert square.grade(f"Here:\n{text.replace(',', ', ')}\nA,A,A,A") == 1
    assert square.grade(f"Here:\n{text}", strict=True) == 0
    assert square.grade("\n".join([rows[0], *rows[:3]])) == 0
    sudoku = sets["sudoku_n4_12"][0]
    assert sudoku.prompt.count("0") == 5  # four blanks and "replace each 0"
    assert sudoku.grade(f"It is\n{' '.join(sudoku.answer)}\n") == 1
    assert sudoku.grade("\n".join(" ".join(line) for line in sudoku.answer.splitlines()), strict=True) == 0


def test_bad_input_is_told() -> None:
    with pytest.raises(UserError, match="all different"):
        ListProblem("copy", (1, 1))
    with pytest.raises(UserError, match="take a word"):
        ListProblem("replace_random", (1, 2))
    with pytest.raises(UserError, match="must not be in the list"):
        ListProblem("insert_random", (1, 2), 2)
    with pytest.raises(UserError, match="from 0 to 2"):
        ListProblem("insert_index", (1, 2), 3, 3)
    with pytest.raises(UserError, match="choose one of"):
        ListProblem("rotate", (1, 2))
    few: BenchTask = word_tasks(["a", "b", "c", "d"], (3,))["copy"]
    with pytest.raises(UserError, match="too few"):
        list(questions(few))
