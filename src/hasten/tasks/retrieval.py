"""Finding facts in a context.

Signs stand between spaces (`red = moon`), so that a word is the same token in the table and in the answer.
Answers restate the key or the path: every step is then one look-up.
"""

from __future__ import annotations

import itertools
import random

from .base import Example, Task, pick_size, register
from .words import ALL_WORDS, KEY_WORDS, LIST_WORDS


@register
class Lookup(Task):
    name = "lookup"
    category = "retrieval"
    title = "Look up several keys in a table"

    def generate(self, rng: random.Random, difficulty: float) -> Example:
        keys = rng.sample(KEY_WORDS, pick_size(rng, 2, len(KEY_WORDS), difficulty))
        table = {key: rng.choice(LIST_WORDS) for key in keys}
        asked = rng.sample(keys, rng.randint(1, min(6, len(keys))))
        rows = ", ".join(f"{key} = {value}" for key, value in table.items())
        answer = ", ".join(f"{key} = {table[key]}" for key in asked)
        return self.example(f"Table: {rows}\nWrite the entries of: {', '.join(asked)}", answer)


@register
class Multihop(Task):
    name = "multihop"
    category = "retrieval"
    title = "Follow links for several steps"

    def generate(self, rng: random.Random, difficulty: float) -> Example:
        size = pick_size(rng, 2, 40, difficulty)
        steps = rng.randint(1, min(4, size))
        words = iter(rng.sample(ALL_WORDS, 2 * size))
        path = [next(words) for _ in range(steps + 1)]
        links = list(itertools.pairwise(path))
        # The other links form chains too, so that the asked one does not stand out.
        last = path[-1] if rng.random() < 0.5 else next(words)
        while len(links) < size:
            new = next(words)
            links.append((last, new))
            last = new if rng.random() < 0.7 or len(links) + 1 >= size else next(words)
        rng.shuffle(links)
        rows = ", ".join(f"{a} -> {b}" for a, b in links)
        plural = "s" if steps > 1 else ""
        question = f"Start at {path[0]} and take {steps} step{plural}. Write all words on the way."
        return self.example(f"Links: {rows}\n{question}", " ".join(path))


@register
class Needle(Task):
    name = "needle"
    category = "retrieval"
    title = "Find one code among many sentences"

    def generate(self, rng: random.Random, difficulty: float) -> Example:
        size = pick_size(rng, 1, 20, difficulty)
        doors = rng.sample(LIST_WORDS, size)
        codes = {door: rng.randint(1000, 9999) for door in doors[: rng.randint(1, size)]}
        sentences = [f"The code of the {door} door is {code}." for door, code in codes.items()]
        for door in doors[len(codes) :]:
            place = rng.choice(KEY_WORDS)
            filler = rng.choice(("The {} door is near the {}.", "Nobody opens the {} door at the {}."))
            sentences.append(filler.format(door, place))
        rng.shuffle(sentences)
        door = rng.choice(list(codes))
        return self.example(f"{' '.join(sentences)}\nWhat is the code of the {door} door?", str(codes[door]))
