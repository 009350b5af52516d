"""Named entities in sentences, one tag a word.

The answer repeats each word before its tag, so the model never has to count words. Names of places and
people also occur within names of organisations: the tag depends on the context, not on the word alone.
"""

from __future__ import annotations

import random

from .base import Example, Task, pick_size, register
from .words import CITIES, FIRST_NAMES, JOBS, LAST_NAMES, LIST_WORDS

ORGANISATIONS = (
    "Bank", "Press", "Motors", "Foods", "Group", "College", "Museum", "Airways", "Records", "Steel",
)  # fmt: skip

SENTENCES = (
    "PER lives in LOC",
    "PER works for ORG",
    "PER moved from LOC to LOC",
    "ORG has a new office in LOC",
    "ORG was founded by PER in LOC",
    "the JOB PER met PER in LOC",
    "PER sold the WORD to ORG",
    "the JOB likes the WORD and the WORD",
    "the WORD came from LOC",
    "ORG and ORG share a WORD",
)


def draw_words(rng: random.Random, slot: str) -> list[str]:
    """The words that stand for a slot of a sentence, or the word itself."""
    if slot == "PER":
        return [rng.choice(FIRST_NAMES), rng.choice(LAST_NAMES)][: rng.randint(1, 2)]
    if slot == "LOC":
        return [rng.choice(CITIES)]
    if slot == "ORG":
        return [rng.choice(CITIES + LAST_NAMES), rng.choice(ORGANISATIONS)]
    if slot == "JOB":
        return [rng.choice(JOBS)]
    return [rng.choice(LIST_WORDS)] if slot == "WORD" else [slot]


@register
class Bio(Task):
    name = "bio"
    category = "tagging"
    title = "Tag persons, places and organisations, word by word"

    def generate(self, rng: random.Random, difficulty: float) -> Example:
        words, tagged = [], []
        for _ in range(pick_size(rng, 1, 6, difficulty)):
            for slot in rng.choice(SENTENCES).split():
                for i, word in enumerate(draw_words(rng, slot)):
                    tag = f"{'I' if i else 'B'}-{slot}" if slot in ("PER", "LOC", "ORG") else "O"
                    words.append(word)
                    tagged.append(f"{word}/{tag}")
            words.append(".")
            tagged.append("./O")
        request = "Tag every word as B-PER, I-PER, B-LOC, B-ORG, I-ORG or O, like Oslo/B-LOC"
        return self.example(f"{request}: {' '.join(words)}", " ".join(tagged))
