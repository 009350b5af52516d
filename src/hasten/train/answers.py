"""What a model itself answers to questions of the training split, graded and kept in a file: data to distil it on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from hasten.engine import SamplingParams
from hasten.errors import UserError
from hasten.llm import LLM, Generation
from hasten.tasks import TASKS, Example
from hasten.train.card import budget
from hasten.train.data import Document
from hasten.train.trainer import make_folder

FILE = "answers.jsonl"
NEEDED = {"right", "prompt_token_ids", "token_ids"}
"""Of each answer, for training."""
TOGETHER = 64
"""Questions that are asked in one batch, and written down together."""


def gather(
    llm: LLM,
    questions: Iterable[Example],
    method: str,
    file: Path,
    origin: Mapping[str, Any],
    report: Callable[[int], None] = lambda done: None,
) -> None:
    """Write down a model's greedy answers to all questions, right or wrong, in their order.

    The first line of the file is `origin`. Each of the others is an object with the question's `task` and `prompt`, the
    answer's `text`, the `prompt_token_ids` and `token_ids` of both, and whether it is `right`. Questions that stand in
    the file already are not asked again, so that a run which was interrupted comes to the same file.

    Args:
        llm: the model.
        questions: the same ones in the same order, however often the file is resumed.
        method: how it decodes.
        file: made, or continued.
        origin: what the answers depend on; those of a file that is continued must have the same.
        report: told how many were answered, those that were there already included.

    Raises:
        UserError: the file has another origin, is damaged, or its folder cannot be made.
    """
    make_folder(file.parent)
    answered = read_answers(file, origin)
    if not answered:
        file.write_text(_lines([origin]))
    report(len(answered))
    waiting = islice(questions, len(answered), None)
    while batch := list(islice(waiting, TOGETHER)):
        params = [SamplingParams(max_tokens=budget(llm, question)) for question in batch]
        answers = llm.generate([question.prompt for question in batch], params, method)
        with file.open("a") as stream:
            stream.write(_lines(_graded(*pair) for pair in zip(batch, answers, strict=True)))
        report(len(batch))


def _graded(question: Example, answer: Generation) -> dict[str, Any]:
    """One line of the file."""
    return {
        "task": question.task,
        "right": TASKS[question.task].grade(question, answer.text),
        "prompt": question.prompt,
        "text": answer.text,
        "prompt_token_ids": answer.prompt_token_ids,
        "token_ids": answer.token_ids,
    }


def _lines(documents: Iterable[Mapping[str, Any]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(document) + "\n" for document in documents)


def read_answers(file: Path, origin: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All answers of a file, none where there is no file; one whose line was cut off by an interrupt is removed there.

    Raises:
        UserError: the file has another origin, or is damaged.
    """
    try:
        content = file.read_bytes() if file.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            file.write_bytes(whole)
        given, *answers = [dict(json.loads(line)) for line in whole.splitlines()] or [dict(origin)]
        if not all(answer.keys() >= NEEDED for answer in answers):
            raise ValueError("something is missing")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {file}: it is damaged, or no file of answers") from error
    if given != origin:
        changed = [key for key, value in origin.items() if given.get(key) != value]
        raise UserError(f"the answers in {file} were given with another {', '.join(changed)}")
    return answers


def right_answers(answers: Iterable[Mapping[str, Any]]) -> list[Document]:
    """The right ones, as they are trained on."""
    return [
        Document([*answer["prompt_token_ids"], *answer["token_ids"]], len(answer["prompt_token_ids"]))
        for answer in answers
        if answer["right"]
    ]
