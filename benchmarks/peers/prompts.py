"""Prompts as token ids: the same for every peer."""

from __future__ import annotations

from pathlib import Path

from hasten.bench.suite import load_suite
from hasten.errors import UserError
from hasten.model.checkpoint import read_json
from hasten.model.tokenizer import load_tokenizer


def encode(checkpoint: Path, sources: str, count: int, max_tokens: int) -> list[list[int]]:
    """Token ids of `count` prompts, taken in turns from the sources and evenly from each.

    Args:
        checkpoint: whose tokenizer encodes, and whose context they must fit with the new tokens.
        sources: suites of `hasten bench` or files of prompts, with commas between.

    Raises:
        UserError: unknown source, a conversation, too few prompts that fit.
    """
    room = read_json(checkpoint / "config.json").get("max_position_embeddings", 0) - max_tokens
    tokenizer = load_tokenizer(checkpoint)
    names = [name for name in sources.split(",") if name]
    if not names:
        raise UserError("give at least one suite or file of prompts")
    chosen: list[list[list[int]]] = []
    for place, name in enumerate(names):
        loaded = load_suite(name)
        if any(prompt.turns for prompt in loaded):
            raise UserError(f"{name} has conversations: give prompts that do not depend on an answer")
        encoded = [tokenizer(prompt.prompt, verbose=False)["input_ids"] for prompt in loaded]
        fitting = [ids for ids in encoded if 0 < len(ids) <= room]
        share = (count + len(names) - 1 - place) // len(names)
        if len(fitting) < share:
            raise UserError(f"{name} has {len(fitting)} prompts that fit the context; {share} are needed")
        chosen.append([fitting[number * len(fitting) // share] for number in range(share)])
    return [chosen[number % len(names)][number // len(names)] for number in range(count)]
