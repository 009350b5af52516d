"""Lexical units: runs of tokens that a model is sure of once it knows the token before.

Arxiv 2405.15208 marks them by the model's own probabilities. They are those of one pass over each dialogue, kept in a
file, so that the model is not needed any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hasten.files import write_text, writing
from hasten.llm import LLM
from hasten.train.heads.dialogues import Dialogue
from hasten.train.heads.states import digests, of_one_pass, reading
from hasten.train.lines import lines_of, read_lines

FILE = "confidences.jsonl"
NEEDED = {"confidences": list}
"""Of each pass, a line of the file."""
ROWS = 512
"""Of a pass: each has logits."""
PLACES = 4
"""Digits that are kept of a probability."""


def read_confidences(
    llm: LLM, dialogues: Sequence[Dialogue], file: Path, report: Callable[[int], None] = lambda done: None
) -> list[list[float]]:
    """How likely the model finds each token of each answer, given all before; what an interrupted run left is made.

    Args:
        llm: whose dialogues these are.
        file: made, or continued. Its first line says what the others depend on.
        report: told how many dialogues were read, those of an earlier run included.

    Raises:
        UserError: the file was made of something else, is damaged, or cannot be written.
    """
    origin = {
        "model": llm.folder.name,
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "backend": llm.model.backend.name,
        "dialogues": digests(dialogues)[-1],
    }
    lines = read_lines(file, origin, NEEDED)
    write_text(file, lines_of([origin, *lines]))
    done = [answer for line in lines for answer in line["confidences"]]
    report(len(done))
    while len(done) < len(dialogues):
        fresh = _pass(llm, of_one_pass(dialogues[len(done) :], ROWS))
        with writing(file), file.open("a", encoding="utf-8") as stream:
            stream.write(lines_of([{"confidences": fresh}]))
        done += fresh
        report(len(fresh))
    return done


def kept_confidences(file: Path) -> list[list[float]]:
    """All that stand in a file.

    Raises:
        UserError: there is none, or it is damaged.
    """
    return [answer for line in read_lines(file, None, NEEDED) for answer in line["confidences"]]


@torch.inference_mode()
def _pass(llm: LLM, dialogues: Sequence[Dialogue]) -> list[list[float]]:
    """Of each dialogue, the probabilities of its answer's tokens."""
    answers = [each.answer for each in dialogues]
    places, start = list[int](), 0
    for each in dialogues:
        # The row before a token says it.
        places += range(start + len(each.prompt) - 1, start + len(each.ids) - 1)
        start += len(each.ids)
    with reading(llm, dialogues) as rows:
        logits = llm.model.forward(rows, places)
    said = torch.tensor([token for answer in answers for token in answer], device=logits.device)
    likely = (logits.gather(1, said[:, None])[:, 0] - logits.logsumexp(-1)).exp()
    parts = torch.split(likely, [len(answer) for answer in answers])
    return [[round(value, PLACES) for value in part.tolist()] for part in parts]


def units(sure: Sequence[bool], most: int, first: int = 0) -> list[range]:
    """The units of an answer, from left to right; those of one token are ordinary tokens.

    Args:
        sure: of each token, whether it may belong to the unit of the one before it.
        most: tokens of a unit.
        first: the token that begins the first unit.
    """
    found = []
    while first < len(sure):
        stop = first + 1
        while stop < min(len(sure), first + most) and sure[stop]:
            stop += 1
        found.append(range(first, stop))
        first = stop
    return found
