"""Dialogues to distil on: what a model says to requests that nobody had to write.

A model that was trained to chat also knows how a user's turn reads: made to go on from the opening of one, it invents
requests ("Magpie: Alignment Data Synthesis from Scratch by Prompting Aligned LLMs with Nothing", 2024, arXiv
2406.08464, section 2). Others ask for work on a text (a summary, an answer from it, a translation), the texts being
earlier answers, so that long prompts whose words come again are among them. A model without a chat template is asked
the training questions of the built-in tasks. Or the user brings a file of prompts.

The model answers all of them itself: heads that were trained on other people's text draft another one's words.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hasten.engine import SamplingParams
from hasten.errors import UserError
from hasten.files import json_line, make_folder, write_text, writing
from hasten.llm import LLM
from hasten.model.tokenizer import render_chat
from hasten.tasks import TASKS, examples
from hasten.train.lines import lines_of, read_lines

TOGETHER = 32
"""Requests of a batch."""
LEAST_WORDS, LEAST_TEXT = 3, 20
"""Of a request that is kept, and of an answer that others are about; in words."""
MOST_TEXTS = 4
"""Earlier answers that a request is about."""
NUCLEUS = 0.9
"""Of requests: what the model hardly believes in itself is no request."""
MEASURED = ({"question_id", "turns"}, {"task_id", "canonical_solution"})
"""What marks the questions of Spec-Bench (and MT-Bench), and of HumanEval."""
NEEDED = {"dialogues": list}
"""Of each batch, a line of the file."""
BARREN = 20
"""Batches without a single request behind which no more are tried."""
PLACEHOLDER = "\u2e2eREQUEST\u2e2e"
"""Stands in a rendered template where a user's text goes."""
TASK_SEED = "heads"
EACH_TASK = 100_000

ABOUT_TEXT = (
    "Summarize the following text:\n\n{text}",
    "{text}\n\nSummarize the text above in two sentences.",
    "Read the text and answer the question.\n\nText: {text}\n\nQuestion: what is the main point?",
    "Using only this information, explain what it is about:\n\n{text}",
    "Translate the following text to French:\n\n{text}",
    "Translate German to English: {text}",
    "Rewrite this text in simple words:\n\n{text}",
    "Correct the mistakes in this text:\n\n{text}",
    "Here is a document:\n\n{text}\n\nList the facts that it states.",
    "Continue this text:\n\n{text}",
)
"""Requests about a text."""


@dataclass(frozen=True)
class Dialogue:
    """A prompt and what the model answered, as token ids; the end of the answer is part of it."""

    prompt: list[int]
    answer: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Writing:
    """How dialogues are made; a file that is continued must have been made the same way.

    Attributes:
        count: dialogues.
        request, answer: tokens of one at most.
        about: of so many batches, one is about texts; 0 for none.
        sampled: of so many batches, one is answered at temperature 1, the others greedily; 0 for none.
        seed: of what is drawn.

    Raises:
        UserError: out of range.
    """

    count: int = 4000
    request: int = 160
    answer: int = 256
    about: int = 3
    sampled: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 2 or self.request < 8 or self.answer < 8:
            raise UserError("dialogues: at least 2, whose requests and answers may take 8 tokens or more")
        if self.about < 0 or self.sampled < 0:
            raise UserError("dialogues: about and sampled must not be negative")


def write_dialogues(
    llm: LLM,
    file: Path,
    how: Writing,
    prompts: Sequence[str] | None = None,
    report: Callable[[int], None] = lambda done: None,
    enough: Callable[[], bool] = lambda: False,
) -> list[Dialogue]:
    """Make dialogues, or make the rest of those in a file, which then stand in it.

    The first line of the file says how they were made. A run that was interrupted and continued comes to the same file.

    Args:
        llm: the model that asks and answers.
        file: JSON lines.
        how: they are made.
        prompts: of the user's own, in place of invented ones; as many dialogues as these, at most `how.count`.
        report: told how many there are, those that stood in the file included.
        enough: asked before each batch but the first: whether to end with what there is. Another run may go on.

    Raises:
        UserError: the file was made in another way, is damaged, or cannot be written; a model that invents no requests.
    """
    make_folder(file.parent)
    origin = {"model": llm.folder.name, **vars(how), "prompts": None if prompts is None else len(prompts)}
    batches = [line["dialogues"] for line in read_lines(file, origin, NEEDED)]
    write_text(file, lines_of([origin, *({"dialogues": batch} for batch in batches)]))
    total = how.count if prompts is None else min(how.count, len(prompts))
    author = _Author(llm, how, prompts)
    done = min(total, sum(map(len, batches)))
    report(done)
    while done < total and not (done and enough()):
        if len(batches) >= BARREN and not any(batches[-BARREN:]):
            raise UserError(f"{llm.folder} invents no requests: give a file of prompts")
        fresh = author.batch(len(batches), [line["text"] for batch in batches for line in batch])
        with writing(file), file.open("a", encoding="utf-8") as stream:
            stream.write(lines_of([{"dialogues": fresh}]))
        batches.append(fresh)
        report(min(len(fresh), total - done))
        done += len(fresh)
    return _dialogues(batches)[:total]


def read_dialogues(file: Path) -> list[Dialogue]:
    """All dialogues of a file, however they were made.

    Raises:
        UserError: there is none, or it is damaged.
    """
    return _dialogues([line["dialogues"] for line in read_lines(file, None, NEEDED)])


def _dialogues(batches: Iterable[list[dict[str, Any]]]) -> list[Dialogue]:
    return [Dialogue(line["prompt_token_ids"], line["token_ids"]) for batch in batches for line in batch]


def read_prompts(file: Path) -> list[str]:
    """A user's own prompts: JSON lines with a `prompt` each, or plain text, one per line.

    Raises:
        UserError: unreadable, a line that is no prompt (with its number), none at all, or questions of Spec-Bench or
            HumanEval: what figures are measured on is not trained on.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from {file}: {error}") from error
    structured = file.suffix in (".json", ".jsonl")
    prompts = [
        _prompt(file, number, line) if structured else line for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not prompts:
        raise UserError(f"{file} has no prompts")
    return prompts


def _prompt(file: Path, number: int, line: str) -> str:
    entry = json_line(file, number, line)
    if isinstance(entry, dict) and any(entry.keys() >= names for names in MEASURED):
        raise UserError(f"{file}, line {number}: a question that figures are measured on, which is not trained on")
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{file}, line {number}: every line needs a string under 'prompt'")
    return prompt


class _Author:
    """Makes the batches of a file, each from what stands before it."""

    def __init__(self, llm: LLM, how: Writing, prompts: Sequence[str] | None) -> None:
        self.llm, self.how, self.prompts = llm, how, prompts
        self._opening, self._closing = _user_turn(llm)

    def batch(self, number: int, texts: Sequence[str]) -> list[dict[str, Any]]:
        """A batch: per dialogue the `text` of the answer, and the `prompt_token_ids` and `token_ids` of both.

        Args:
            texts: earlier answers.
        """
        room = self.llm.model.config.max_positions - self.how.answer
        prompts = [ids for request in self._requests(number, texts) if len(ids := self.read(request)) <= room]
        sampled = bool(self.how.sampled) and number % self.how.sampled == self.how.sampled - 1
        params = [
            SamplingParams(max_tokens=self.how.answer, temperature=float(sampled), seed=self._seed(number, place))
            for place in range(len(prompts))
        ]
        answers = self.llm.generate(prompts, params, "plain") if prompts else []
        return [
            {"text": answer.text, "prompt_token_ids": answer.prompt_token_ids, "token_ids": answer.token_ids}
            for answer in answers
        ]

    def read(self, request: str) -> list[int]:
        """A request as the model reads it; the questions of tasks are what it reads."""
        if self.llm.templated and (self._opening or self.prompts is not None):
            return self.llm.apply_chat_template([{"role": "user", "content": request}])
        return self.llm.encode(request)

    def _requests(self, number: int, texts: Sequence[str]) -> list[str]:
        if self.prompts is not None:
            return list(self.prompts[number * TOGETHER : (number + 1) * TOGETHER])
        if not self._opening:
            return list(islice(_questions(), number * TOGETHER, (number + 1) * TOGETHER))
        long = [text for text in texts if len(text.split()) >= LEAST_TEXT]
        if self.how.about and long and number % self.how.about == self.how.about - 1:
            draw = random.Random(self._seed(number, 0))
            joined = ("\n\n".join(draw.choices(long, k=draw.randint(1, MOST_TEXTS))) for _ in range(TOGETHER))
            return [draw.choice(ABOUT_TEXT).format(text=text) for text in joined]
        return self._invented(number)

    def _invented(self, number: int) -> list[str]:
        """Users' turns, as the model imagines them; those that come to an end and are no repetition."""
        params = [
            SamplingParams(
                max_tokens=self.how.request,
                temperature=1.0,
                top_p=NUCLEUS,
                seed=self._seed(number, place),
                stop_token_ids=self._closing,
            )
            for place in range(TOGETHER)
        ]
        asked = self.llm.generate([self._opening] * TOGETHER, params, "plain")
        told = [each.text.strip() for each in asked if each.choices[0].finish_reason == "stop"]
        return [text for text in dict.fromkeys(told) if len(text.split()) >= LEAST_WORDS]

    def _seed(self, number: int, place: int) -> int:
        return (self.how.seed << 40) + number * TOGETHER + place


def _user_turn(llm: LLM) -> tuple[list[int], tuple[int, ...]]:
    """What comes before a user's first words, and the token behind the last one; nothing where no template says it."""
    if not llm.templated:
        return [], ()
    rendered = render_chat(llm.tokenizer, [{"role": "user", "content": PLACEHOLDER}])
    opening, _, closing = rendered.partition(PLACEHOLDER)
    before, behind = (llm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (opening, closing))
    return before, tuple(behind[:1])


def _questions() -> Iterator[str]:
    """Training questions of the built-in tasks, one of each in turn."""
    streams = [iter(examples(task, "train", EACH_TASK, TASK_SEED)) for task in TASKS]
    while True:
        for stream in streams:
            if (example := next(stream, None)) is not None:
                yield example.prompt
