"""Dialogues: how they are invented and answered, and that an interrupted file comes to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hasten import LLM, SamplingParams
from hasten.errors import UserError
from hasten.train.heads import dialogues
from hasten.train.heads.dialogues import ABOUT_TEXT, Writing, read_dialogues, read_prompts, write_dialogues

HOW = Writing(count=20, request=24, answer=16, about=2, sampled=2)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialogues, "TOGETHER", 6)
    monkeypatch.setattr(dialogues, "LEAST_WORDS", 1)
    monkeypatch.setattr(dialogues, "LEAST_TEXT", 1)


def test_a_model_asks_and_answers_itself(llm: LLM, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    made = write_dialogues(llm, file, HOW)
    assert len(made) == HOW.count and read_dialogues(file)[: len(made)] == made
    batches = [json.loads(line)["dialogues"] for line in file.read_text().splitlines()[1:]]
    assert len({tuple(each.prompt) for each in made}) > 1
    for number, batch in enumerate(batches):
        for line in batch:
            text = llm.tokenizer.decode(line["prompt_token_ids"])
            assert text.startswith("user:") and text.endswith("assistant:")
            if number % 2 == 0:
                # Greedy, and what anybody would get who asks the same.
                again = llm.generate([line["prompt_token_ids"]], SamplingParams(max_tokens=HOW.answer), "plain")[0]
                assert again.token_ids == line["token_ids"]


def test_every_so_often_requests_are_about_earlier_answers(llm: LLM, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    write_dialogues(llm, file, HOW)
    batches = [json.loads(line)["dialogues"] for line in file.read_text().splitlines()[1:]]
    opening = [template.partition("{text}")[0].split("\n")[0] for template in ABOUT_TEXT]
    about = [
        any(start and start[:6] in llm.tokenizer.decode(line["prompt_token_ids"]) for start in opening)
        for line in batches[1]
    ]
    assert len(batches[1]) == 0 or any(about)


@pytest.mark.parametrize("lines", [0, 1, 2])
def test_interrupted_and_continued_it_is_the_same_file(llm: LLM, tmp_path: Path, lines: int) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    write_dialogues(llm, whole, HOW)
    content = whole.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(content[: lines + 1]) + content[lines + 1][:10])
    told: list[int] = []
    write_dialogues(llm, cut, HOW, report=told.append)
    assert cut.read_bytes() == whole.read_bytes()
    assert sum(told) == HOW.count and told[0] == sum(
        len(json.loads(line)["dialogues"]) for line in content[1 : lines + 1]
    )


def test_prompts_of_the_users_own(llm: LLM, tmp_path: Path) -> None:
    prompts = [f"what is {number}?" for number in range(9)]
    made = write_dialogues(llm, tmp_path / "d.jsonl", HOW, prompts)
    assert [each.prompt for each in made] == [
        llm.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in prompts
    ]


def test_without_a_users_turn_the_tasks_ask(tmp_path: Path) -> None:
    llm = LLM("tiny", dtype="float32")
    made = write_dialogues(llm, tmp_path / "d.jsonl", Writing(count=6, answer=8))
    assert len({llm.tokenizer.decode(each.prompt).split()[0] for each in made}) > 3


def test_what_cannot_be(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "d.jsonl"
    write_dialogues(llm, file, HOW)
    with pytest.raises(UserError, match="made with another seed"):
        write_dialogues(llm, file, Writing(count=20, request=24, answer=16, about=2, sampled=2, seed=1))
    with pytest.raises(UserError, match="at least 2"):
        Writing(count=1)
    with pytest.raises(UserError, match="must not be negative"):
        Writing(about=-1)
    with pytest.raises(UserError, match="cannot read"):
        read_dialogues(tmp_path / "none")
    monkeypatch.setattr(dialogues, "LEAST_WORDS", 1000)
    monkeypatch.setattr(dialogues, "BARREN", 2)
    with pytest.raises(UserError, match="invents no requests"):
        write_dialogues(llm, tmp_path / "other.jsonl", HOW)


def test_files_of_prompts(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("one\n\ntwo\n")
    lines.write_text('{"prompt": "one"}\n{"prompt": "two", "more": 1}\n')
    assert read_prompts(text) == read_prompts(lines) == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"question_id": 1, "category": "qa", "turns": ["x"]}', "measured on"),
        ('{"task_id": "HumanEval/0", "prompt": "def f():", "canonical_solution": "pass"}', "measured on"),
        ('{"prompt": 3}', "line 1: every line needs"),
        ("[1]", "every line needs"),
        ("nothing", "not JSON"),
        ("", "has no prompts"),
    ],
)
def test_files_that_are_not_for_training(tmp_path: Path, line: str, told: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(line)
    with pytest.raises(UserError, match=told):
        read_prompts(file)
