"""Prompts as token ids: the same for every peer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from hasten.bench.prompts import BenchPrompt, spread
from hasten.bench.suite import load_suite
from hasten.errors import UserError
from hasten.model.tokenizer import load_tokenizer, render_chat


def encode(checkpoint: Path, context: int, sources: str, count: int, max_tokens: int, chat: bool) -> list[list[int]]:
    """Token ids of `count` prompts, taken in turns from the sources and evenly from each.

    Of conversations the first turns are taken, as later ones depend on answers.

    Args:
        checkpoint: whose tokenizer encodes.
        context: of the model, which they must fit with the new tokens.
        sources: suites of `hasten bench` or files of prompts, with commas between.
        chat: put all through the chat template, not conversations only.

    Raises:
        UserError: unknown source, no chat template, too few prompts that fit.
    """
    tokenizer = load_tokenizer(checkpoint)
    if chat and not tokenizer.chat_template:
        raise UserError(f"{checkpoint} has no chat template: leave --chat out")
    names = [name for name in sources.split(",") if name]
    if not names:
        raise UserError("give at least one suite or file of prompts")
    chosen: list[list[list[int]]] = []
    for place, name in enumerate(names):
        encoded = [_ids(tokenizer, prompt, chat) for prompt in load_suite(name) if prompt.opens]
        fitting = [ids for ids in encoded if 0 < len(ids) <= context - max_tokens]
        share = (count + len(names) - 1 - place) // len(names)
        if len(fitting) < share:
            raise UserError(f"{name} has {len(fitting)} prompts that fit the context; {share} are needed")
        chosen.append(spread(fitting, share))
    return [chosen[number % len(names)][number // len(names)] for number in range(count)]


def _ids(tokenizer: Any, prompt: BenchPrompt, chat: bool) -> list[int]:
    """A prompt as the model reads it: what is said in a conversation through the chat template, if there is one."""
    if tokenizer.chat_template and (chat or prompt.turns):
        text = render_chat(tokenizer, [{"role": "user", "content": prompt.prompt}])
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return list(tokenizer(prompt.prompt, verbose=False)["input_ids"])


def of_length(prompts: Sequence[list[int]], length: int, number: int) -> list[int]:
    """One prompt of so many tokens: all of them one behind the other, over and over, from another one on each time."""
    start = number % len(prompts)
    once = [*prompts[start:], *prompts[:start]]
    return list(islice(chain.from_iterable(once * -(-length // sum(map(len, once)))), length))


def beginnings(prompts: Sequence[list[int]], rows: int) -> list[list[int]]:
    """All prompts, the longest of them cut so that together they have so many tokens at most."""
    lengths = range(max(map(len, prompts)) + 1)
    longest = max(length for length in lengths if sum(min(length, len(prompt)) for prompt in prompts) <= rows)
    return [prompt[:longest] for prompt in prompts] if longest else [prompts[0][:rows]]
