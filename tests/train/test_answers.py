"""What a model answers, graded and written down: the right ones are trained on, and an interrupted file is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
    # Of the second batch one answer is left: it is asked again with the one beside it.
    assert told == [2, 2, 2]
    assert resumed.read_bytes() == file.read_bytes()


class Neighbourly:
    """In a model's place: its answers show who was asked beside whom, as a model's last bits do."""

    model = SimpleNamespace(config=SimpleNamespace(max_positions=256))

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def generate(self, prompts: list[str], params: object, method: str) -> list[Any]:
        return [
            SimpleNamespace(text=f"{number} of {len(prompts)}", prompt_token_ids=self.encode(prompt), token_ids=[0])
            for number, prompt in enumerate(prompts)
        ]


def test_a_file_that_was_cut_off_anywhere_becomes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answers, "TOGETHER", 4)
    questions, llm, file = list(training_examples(10, 0, 0.1)), Neighbourly(), tmp_path / "answers.jsonl"
    gather(llm, questions, "plain", file, ORIGIN)  # type: ignore[arg-type]
    whole = file.read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    for length in {0, 1, *ends, *(end + 1 for end in ends), *range(0, len(whole), 97)}:
        file.write_bytes(whole[:length])
        gather(llm, questions, "plain", file, ORIGIN)  # type: ignore[arg-type]
        assert file.read_bytes() == whole, length
    # As one that was asked for more only later.
    file.unlink()
    for asked in (3, 6, 10):
        gather(llm, questions[:asked], "plain", file, ORIGIN)  # type: ignore[arg-type]
    assert file.read_bytes() == whole


def test_a_file_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "answers.jsonl.new").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*answers\.jsonl: Is a directory"):
        gather(Neighbourly(), training_examples(2, 0), "plain", tmp_path / "answers.jsonl", ORIGIN)  # type: ignore[arg-type]
    assert not (tmp_path / "answers.jsonl").exists()


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
    half, wrong = '{"right": true}', '{"right": true, "prompt_token_ids": "12", "token_ids": null}'
    nested = "[" * 100_000
    for content in ("nonsense\n", "[1]\n", *(f"{json.dumps(ORIGIN)}\n{line}\n" for line in (half, wrong, nested))):
        bad.write_text(content)
        with pytest.raises(UserError, match="cannot read"):
            read_answers(bad, ORIGIN)
