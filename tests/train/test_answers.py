"""What a model answers, graded and written down: the right ones are trained on, and an interrupted file is resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hasten import LLM
from hasten.errors import UserError
from hasten.tasks import TASKS, Example
from hasten.train import answers
from hasten.train.answers import gather, read_answers, right_answers
from hasten.train.data import training_examples

ORIGIN = {"model": "tiny", "seed": 0}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny", dtype="float32")


@pytest.fixture(scope="module")
def questions() -> list[Example]:
    """Five that the model can answer, and one whose answer it cannot guess."""
    easy = [e for e in training_examples(200, 0, 0.3) if e.task in ("copy", "reverse")][:5]
    return [*easy, Example("copy", easy[0].prompt, " another list")]


@pytest.fixture(scope="module")
def file(llm: LLM, questions: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    gather(llm, questions, "plain", made, ORIGIN)
    return made


def test_only_right_answers_are_trained_on(llm: LLM, questions: list[Example], file: Path):
    answered = read_answers(file, ORIGIN)
    assert [answer["prompt"] for answer in answered] == [question.prompt for question in questions]
    right = []
    for question, answer in zip(questions, answered, strict=True):
        assert answer["right"] == TASKS[question.task].grade(question, answer["text"])
        if answer["right"]:
            right.append(question)
    assert 0 < len(right) < len(questions)
    end = llm.tokenizer.eos_token_id
    for question, document in zip(right, right_answers(answered), strict=True):
        assert document.ids[: document.answer] == llm.encode(question.prompt)
        assert document.ids[-1] == end
        assert llm.tokenizer.decode(document.ids[document.answer : -1]).strip() == question.answer.strip()


def test_an_interrupted_file_becomes_the_same(
    llm: LLM, questions: list[Example], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(answers, "TOGETHER", 2)
    resumed = tmp_path / "new" / "answers.jsonl"
    told = []

    def interrupt(done: int) -> None:
        told.append(done)
        if sum(told) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gather(llm, questions, "plain", resumed, ORIGIN, interrupt)
    lines = resumed.read_bytes().splitlines(keepends=True)
    assert lines == file.read_bytes().splitlines(keepends=True)[:5]
    # Killed while it was writing.
    resumed.write_bytes(b"".join(lines)[:-20])
    told.clear()
    gather(llm, questions, "plain", resumed, ORIGIN, told.append)
    assert told == [3, 2, 1]
    assert resumed.read_bytes() == file.read_bytes()


def test_what_is_there_is_not_asked_again(questions: list[Example], file: Path):
    before = file.read_bytes()
    nobody: LLM = None  # type: ignore[assignment]
    gather(nobody, questions, "plain", file, ORIGIN)
    gather(nobody, questions[:2], "plain", file, ORIGIN)
    assert file.read_bytes() == before


def test_other_files_are_refused(file: Path, tmp_path: Path):
    with pytest.raises(UserError, match="with another seed"):
        read_answers(file, {**ORIGIN, "seed": 1})
    bad = tmp_path / "bad.jsonl"
    for content in ("nonsense\n", "[1]\n", json.dumps(ORIGIN) + '\n{"right": true}\n'):
        bad.write_text(content)
        with pytest.raises(UserError, match="cannot read"):
            read_answers(bad, ORIGIN)
