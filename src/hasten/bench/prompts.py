"""Prompts to measure on: how one is held, read from a file, and turned into token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hasten.engine import SamplingParams
from hasten.errors import UserError
from hasten.llm import LLM
from hasten.tasks.parallelbench import Question

MAX_TOKENS = 256


@dataclass(frozen=True)
class BenchPrompt:
    """A prompt, the category it is reported under, and a grader where the right answer is known.

    `turns` are the user's turns of a conversation so far, this one (`prompt`) included; the answers between them are
    plain decoding's own. Empty for a prompt that is taken as it stands.

    Attributes:
        grade: from an output to its score, 0 to 1 (or false and true).
        question: ParallelBench's, whose messages a chat template gets instead of `prompt`.
        max_tokens: new tokens, and the size of a canvas, where nothing else is asked for.
    """

    category: str
    task: str
    prompt: str
    grade: Callable[[str], float] | None
    turns: tuple[str, ...] = ()
    question: Question | None = None
    max_tokens: int = MAX_TOKENS

    def within(self, params: SamplingParams) -> SamplingParams:
        """These parameters, with the prompt's own budget if they have none."""
        return params if params.max_tokens is not None else replace(params, max_tokens=self.max_tokens)


def load_prompts(path: Path) -> list[BenchPrompt]:
    """Prompts from a file: plain text (`.txt`), one prompt per line, or JSON lines.

    A line of JSON has `prompt`, a text that is taken as it stands, or `turns`, the user's texts of a conversation,
    which give one prompt each; and perhaps `category`.

    Raises:
        UserError: no such file, bad JSON (with the line number), no prompts.
    """
    try:
        # Other line ends, such as U+2028, may stand within a string.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from {path}: {error}") from error
    prompts: list[BenchPrompt] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix == ".txt":
            prompts.append(BenchPrompt("file", path.stem, line, None))
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        prompts += _entry(entry, path, number)
    if not prompts:
        raise UserError(f"{path} has no prompts")
    return prompts


def _entry(entry: Any, path: Path, number: int) -> list[BenchPrompt]:
    """The prompts of one line of JSON."""
    if not isinstance(entry, dict):
        entry = {}
    # What a terminal takes for a command is no name.
    category = "".join(each if each.isprintable() else "�" for each in str(entry.get("category", "file")))
    if "turns" in entry:
        turns = entry["turns"]
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
            raise UserError(f"{path}, line {number}: 'turns' must be a list of non-empty strings")
        return [
            BenchPrompt(category, path.stem, turn, None, tuple(turns[: place + 1])) for place, turn in enumerate(turns)
        ]
    text = entry.get("prompt")
    if not isinstance(text, str) or not text:
        raise UserError(f"{path}, line {number}: every line needs a non-empty string under 'prompt', or 'turns'")
    return [BenchPrompt(category, path.stem, text, None)]


def encode(llm: LLM, prompts: Sequence[BenchPrompt], params: SamplingParams) -> list[list[int]]:
    """Token ids of each prompt.

    The earlier turns of a conversation are answered by plain decoding first. A checkpoint with a chat template gets the
    conversation through it, another one the texts with empty lines between.

    Raises:
        UserError: a conversation that outgrows the context; the template refuses it.
    """
    answers: dict[tuple[str, ...], str] = {}
    templated = bool(getattr(llm.tokenizer, "chat_template", None))

    def ids(turns: tuple[str, ...], budget: SamplingParams) -> list[int]:
        texts: list[str] = []
        for place, turn in enumerate(turns, 1):
            texts.append(turn)
            if place < len(turns):
                texts.append(answer(turns[:place], budget))
        if not templated:
            return llm.encode("\n\n".join(texts))
        roles = ("user", "assistant")
        return llm.apply_chat_template([{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)])

    def answer(turns: tuple[str, ...], budget: SamplingParams) -> str:
        if turns not in answers:
            answers[turns] = llm.generate([ids(turns, budget)], budget, "plain")[0].text.strip()
        return answers[turns]

    def encoded(prompt: BenchPrompt) -> list[int]:
        if prompt.turns:
            return ids(prompt.turns, prompt.within(params))
        if prompt.question is not None and templated:
            return llm.apply_chat_template(prompt.question.messages)
        return llm.encode(prompt.prompt)

    return [encoded(prompt) for prompt in prompts]
