"""Editing a small text: the answer is the whole text with one change, most of it a copy."""

from __future__ import annotations

import random
import re

from .base import PROMPT_END, Example, Task, pick_size, register
from .words import KEY_WORDS, LIST_WORDS

# Counting lines is hard for a small model and is not the point here.
DELETE_UP_TO = 5

FORMS = (
    "{key} = {word}",
    "{key} = {number}",
    "  {key}: {number}",
    "  {key}: {word}",
    "item {key}, {number} pieces",
    "set_{key}({word}, {number})",
    "# {word} and {key}",
)
SETTING = re.compile(r"(\s*)(\w+)( = |: )(\w+)")


def draw_lines(rng: random.Random, count: int) -> list[str]:
    """Lines with a different key word each; the first one is not indented."""
    lines: list[str] = []
    for key in rng.sample(KEY_WORDS, count):
        form = rng.choice(FORMS).format(key=key, word=rng.choice(LIST_WORDS), number=rng.randint(1, 99))
        lines.append(form if lines else form.lstrip())
    return lines


def substitute(lines: list[str], old: str, new: str) -> list[str]:
    return [re.sub(rf"\b{old}\b", new, line) for line in lines]


@register
class Edit(Task):
    name = "edit"
    category = "edit"
    title = "Apply one change to a text and write all of it"

    def generate(self, rng: random.Random, difficulty: float) -> Example:
        lines = draw_lines(rng, pick_size(rng, 2, 24, difficulty))
        deletions = (self.delete_number, self.delete_text)
        changes = (self.replace, self.rename, *deletions, self.append, self.set_value)
        change, edited = rng.choice(changes)(rng, lines)
        question = "Text:\n" + "\n".join(lines) + f"\nChange: {change}"
        answer = "\n".join(edited)
        # Always on its own line, even where one line is left.
        return Example(self.name, question + PROMPT_END, "\n" + answer)

    def replace(self, rng: random.Random, lines: list[str]) -> tuple[str, list[str]]:
        present = sorted({w for line in lines for w in re.findall(r"\b[a-z]+\b", line) if w in LIST_WORDS})
        if not present:
            return self.rename(rng, lines)
        old = rng.choice(present)
        new = rng.choice([word for word in LIST_WORDS if word != old])
        return f"replace {old} by {new}.", substitute(lines, old, new)

    def rename(self, rng: random.Random, lines: list[str]) -> tuple[str, list[str]]:
        keys = [w for line in lines for w in re.findall(r"\b[a-z]+\b", line) if w in KEY_WORDS]
        if not keys:
            return self.append(rng, lines)
        old = rng.choice(keys)
        new = rng.choice([word for word in KEY_WORDS if word not in keys])
        return f"rename {old} to {new}.", substitute(lines, old, new)

    def delete_number(self, rng: random.Random, lines: list[str]) -> tuple[str, list[str]]:
        place = rng.randint(1, min(DELETE_UP_TO, len(lines)))
        return f"delete line {place}.", lines[: place - 1] + lines[place:]

    def delete_text(self, rng: random.Random, lines: list[str]) -> tuple[str, list[str]]:
        place = rng.randrange(len(lines))
        return f"delete the line '{lines[place].strip()}'.", lines[:place] + lines[place + 1 :]

    def append(self, rng: random.Random, lines: list[str]) -> tuple[str, list[str]]:
        line = f"{rng.choice(KEY_WORDS)} = {rng.choice(LIST_WORDS)}"
        return f"add the line '{line}' at the end.", [*lines, line]

    def set_value(self, rng: random.Random, lines: list[str]) -> tuple[str, list[str]]:
        settings = [(i, match) for i, line in enumerate(lines) if (match := SETTING.fullmatch(line))]
        if not settings:
            return self.append(rng, lines)
        place, match = rng.choice(settings)
        indent, key, sign, old = match.groups()
        value = old
        while value == old:
            value = str(rng.randint(1, 99)) if old.isdigit() else rng.choice(LIST_WORDS)
        return f"set {key} to {value}.", [*lines[:place], f"{indent}{key}{sign}{value}", *lines[place + 1 :]]
