"""Sentences about people, to be written as one JSON object a line."""

from __future__ import annotations

import json
import random
from typing import Any

from .base import PROMPT_END, Example, Task, pick_size, register
from .words import CITIES, FIRST_NAMES, JOBS, LAST_NAMES

PHRASINGS = (
    "{name}, {age}, lives in {city} and works as a {job}.",
    "{name} is a {job} from {city}, aged {age}.",
    "In {city}, the {job} {name} turned {age}.",
)


def draw_person(rng: random.Random) -> dict[str, Any]:
    return {
        "name": f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}",
        "age": rng.randint(18, 80),
        "city": rng.choice(CITIES),
        "job": rng.choice(JOBS),
    }


def parse_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


@register
class Json(Task):
    name = "json"
    category = "json"
    title = "Extract people from sentences as JSON, one object a line"

    def generate(self, rng: random.Random, difficulty: float) -> Example:
        people = [draw_person(rng) for _ in range(pick_size(rng, 1, 8, difficulty))]
        sentences = "\n".join(rng.choice(PHRASINGS).format(**person) for person in people)
        request = "Write one JSON object per line with the keys name, age, city, job."
        answer = "\n".join(json.dumps(person) for person in people)
        return Example(self.name, f"{request}\n{sentences}{PROMPT_END}", "\n" + answer)

    def grade(self, example: Example, output: str) -> bool:
        try:
            return parse_lines(output) == parse_lines(example.answer)
        except (ValueError, RecursionError):
            return False
