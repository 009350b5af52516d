"""Writing small Python functions from a signature and a docstring."""

from __future__ import annotations

import json
import random
import re
from typing import Any

from .base import PROMPT_END, Example, Task, pick_size, register
from .code_templates import TEMPLATES, Template
from .sandbox import call_all
from .words import LIST_WORDS

FUNCTION_NAMES = ("f", "g", "solve", "compute", "run", "apply", "answer", "helper")

# How an argument may be called, by its name in the template.
ARGUMENT_NAMES = {
    "xs": ("xs", "nums", "values", "numbers", "data"),
    "ws": ("words", "names", "labels", "parts"),
    "s": ("s", "text", "line", "phrase"),
    "n": ("n", "num", "value", "number"),
}
TESTS = 8


def draw_argument(rng: random.Random, name: str, index: int) -> Any:
    """A value for an argument. The first tests have small ones, where mistakes at the borders show."""
    size = rng.randint(1, 2 + index)
    if name == "xs":
        return [rng.randint(-9, 40) for _ in range(size)]
    if name == "ws":
        return rng.choices(LIST_WORDS, k=size)
    if name == "s":
        return " ".join(rng.choice((str, str.title))(word) for word in rng.choices(LIST_WORDS, k=size))
    return rng.randint(1, 5 + 10 * index)


def write_source(template: Template, names: dict[str, str]) -> tuple[str, str, str]:
    """The template's signature, docstring and body, with its names replaced."""

    def rename(text: str) -> str:
        return re.sub(r"\b\w+\b", lambda match: names.get(match[0], match[0]), text)

    lines = template.source.splitlines()
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith('"""'))
    arguments = ", ".join(names[name] for name in template.arguments)
    return arguments, rename(lines[start]), rename("\n".join(lines[start + 1 :]))


@register
class Python(Task):
    name = "python"
    category = "code"
    title = "Write a small Python function"

    def generate(self, rng: random.Random, difficulty: float) -> Example:
        # The templates go from one expression to loops with conditions, so the size is a position there.
        template = TEMPLATES[pick_size(rng, 1, len(TEMPLATES), difficulty) - 1]
        constant = rng.randint(2, 9)
        function = rng.choice(FUNCTION_NAMES)
        names = {name: rng.choice(ARGUMENT_NAMES[name]) for name in template.arguments} | {"k": str(constant)}
        arguments, docstring, body = write_source(template, names)
        head = f"def {function}({arguments}):"
        tests = []
        for index in range(TESTS):
            values = [draw_argument(rng, name, index) for name in template.arguments]
            tests.append((values, json.dumps(template.call(values, constant), sort_keys=True)))
        return Example(
            self.name,
            f"Write the function.\n{head}\n{docstring}{PROMPT_END}",
            f"\n{head}\n{body}",
            {"function": function, "tests": tests},
        )

    def grade(self, example: Example, output: str) -> bool:
        tests = example.meta["tests"]
        results = call_all(output.strip(), example.meta["function"], [values for values, _ in tests])
        return results == [expected for _, expected in tests]
