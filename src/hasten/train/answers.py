"""What a model itself answers to questions of the training split, graded and kept in a file: data to distil it on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from hasten.engine import SamplingParams
from hasten.files import make_folder, write_text, writing
from hasten.llm import LLM, Generation
from hasten.tasks import TASKS, Example
from hasten.train.card import budget
from hasten.train.data import Document
from hasten.train.lines import lines_of, read_lines

FILE = "answers.jsonl"
NEEDED = {"right": bool, "prompt_token_ids": list, "token_ids": list}
"""Of each answer, for training."""
TOGETHER = 64
"""Questions that are asked in one batch, and written down together: what stands beside a question can turn the last bit
of its logits."""


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
    answer's `text`, the `prompt_token_ids` and `token_ids` of both, and whether it is `right`. Batches that stand in
    the file already are not asked again, and one of which only a part does is, as a whole: so a run which was
    interrupted comes to the same file.

    Args:
        llm: the model.
        questions: the same ones in the same order, however often the file is resumed.
        method: how it decodes.
        file: made, or continued.
        origin: what the answers depend on; those of a file that is continued must have the same.
        report: told how many were answered, those that were there already included.

    Raises:
        UserError: the file has another origin, is damaged, or it or its folder cannot be made.
    """
    make_folder(file.parent)
    answered, kept = read_answers(file, origin), 0
    waiting = iter(questions)
    while (batch := list(islice(waiting, TOGETHER))) and kept + len(batch) <= len(answered):
        kept += len(batch)
    if batch:
        write_text(file, lines_of([origin, *answered[:kept]]))
    report(kept)
    while batch:
        params = [SamplingParams(max_tokens=budget(llm, question)) for question in batch]
        answers = llm.generate([question.prompt for question in batch], params, method)
        with writing(file), file.open("a", encoding="utf-8") as stream:
            stream.write(lines_of(_graded(*pair) for pair in zip(batch, answers, strict=True)))
        report(len(batch))
        batch = list(islice(waiting, TOGETHER))


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


def read_answers(file: Path, origin: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All answers of a file: see `read_lines`.

    Raises:
        UserError: the file has another origin, or is damaged.
    """
    return read_lines(file, origin, NEEDED)


def right_answers(answers: Iterable[Mapping[str, Any]]) -> list[Document]:
    """The right ones, as they are trained on."""
    return [
        Document([*answer["prompt_token_ids"], *answer["token_ids"]], len(answer["prompt_token_ids"]))
        for answer in answers
        if answer["right"]
    ]
