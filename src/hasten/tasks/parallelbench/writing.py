"""Text writing: a sentence with given words, a paraphrase, a summary.

The paper grades these with a Java grammar checker, neural similarity and word overlap, on texts by others. Here
everything is made and graded by small grammars of our own, exactly and offline. So the scores are not comparable
with published ones. What is kept is what the tasks are for: one answer has many right forms, and its words depend on
each other (articles, agreement, each word used, one voice and one order throughout). A question says what its
grammar allows; other sentences score 0, however good their English.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from itertools import chain, permutations

from ..words import CITIES, FIRST_NAMES, JOBS
from .base import BenchTask, Question
from .vocabulary import ACTIVITIES, DAYS, EVERYDAY, PLACES, PREPOSITIONS, RARE, SYNONYMS, VERBS

PER_TASK = 100


def written(words: str) -> str:
    """Words as a sentence: with a capital and a full stop."""
    return words[0].upper() + words[1:] + "."


def last_line(text: str) -> str:
    """The words of the last line, for lenient reading: quotes, case, blanks and the full stop do not matter."""
    lines = text.strip().splitlines() or [""]
    return " ".join(lines[-1].strip(" \t\"'").removesuffix(".").lower().split())


# --- words to a sentence -----------------------------------------------------------------------------------------

# Nouns stand for the digits; "V" is a verb in agreement with its subject, "P" a preposition.
SHAPES = (
    "0 and 1 V 2 P 3",
    "0 V 1 and 2 P 3",
    "0 V 1 P 2 and 3",
    "0 P 1 V 2 and 3",
    "0 P 1 and 2 V 3",
    "0 and 1 V 2 and 3",
    "0 V 1 P 2 P 3",
    "0 P 1 V 2 P 3",
)


def article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


@cache
def grammar() -> re.Pattern[str]:
    """The sentences of the language, with N for nouns that take "a" and O for those that take "an".

    sentence = one place? singular group place* | one "and" one place? plural group place*,
    group = one ("and" one)?, place = preposition group, one = article noun.
    """
    one = "(?:the [NO]|a N|an O)"
    group = f"{one}(?: and {one})?"
    place = f"(?: (?:{'|'.join(PREPOSITIONS)}) {group})"
    singular, plural = "|".join(VERBS), "|".join(VERBS.values())
    subject = f"(?:{one}{place}? (?:{singular})|{one} and {one}{place}? (?:{plural}))"
    return re.compile(f"{subject} {group}{place}*")


def grammatical(words: str, nouns: tuple[str, ...]) -> bool:
    """Whether words in small letters, without the full stop, are a sentence with no other nouns than these."""
    kinds = {noun: "O" if article(noun) == "an" else "N" for noun in nouns}
    return grammar().fullmatch(" ".join(kinds.get(word, word) for word in words.split())) is not None


@dataclass(frozen=True)
class SentenceQuestion(Question):
    """Scores 1 if the sentence has all words, as whole words, and is in the grammar."""

    nouns: tuple[str, ...]

    def grade(self, text: str, strict: bool = False) -> float:
        words = last_line(text)
        asked = not strict or (words != "" and text.strip() == written(words))
        return float(asked and set(self.nouns) <= set(words.split()) and grammatical(words, self.nouns))

    def draw(self, rng: random.Random) -> str:
        return draw_sentence(rng, self.nouns)


def draw_sentence(rng: random.Random, nouns: tuple[str, ...]) -> str:
    shape, order = rng.choice(SHAPES), rng.sample(nouns, len(nouns))
    singular, plural = rng.choice(list(VERBS.items()))
    several = "and" in shape.partition("V")[0].partition("P")[0]
    words = []
    for slot in shape.split():
        if slot.isdigit():
            noun = order[int(slot)]
            words += [rng.choice(("the", article(noun))), noun]
        else:
            words.append({"V": plural if several else singular, "P": rng.choice(PREPOSITIONS)}.get(slot, slot))
    return written(" ".join(words))


@dataclass(frozen=True)
class SentenceTask(BenchTask):
    """easy: everyday words of one topic; medium: of different topics; hard: rare words of different topics."""

    topics: dict[str, tuple[str, ...]]
    related: bool

    def ask(self, rng: random.Random, size: int) -> SentenceQuestion:
        if self.related:
            nouns = tuple(rng.sample(rng.choice(list(self.topics.values())), size))
        else:
            nouns = tuple(rng.choice(topic) for topic in rng.sample(list(self.topics.values()), size))
        verbs = ", ".join(chain.from_iterable(VERBS.items()))
        prompt = (
            f"Write one sentence with the words {', '.join(nouns)}.\n"
            f"Besides them use only the, a, an, and; one of the verbs {verbs}; and {', '.join(PREPOSITIONS)}."
        )
        return SentenceQuestion(self.name, prompt, draw_sentence(rng, nouns), nouns)


# --- one meaning in many forms -----------------------------------------------------------------------------------

ORDERS = (
    "{agent} {active} {thing} in {place} on {day}",
    "{agent} {active} {thing} on {day} in {place}",
    "on {day}, {agent} {active} {thing} in {place}",
    "in {place}, {agent} {active} {thing} on {day}",
    "{thing} is {passive} by {agent} in {place} on {day}",
    "{thing} is {passive} by {agent} on {day} in {place}",
    "on {day}, {thing} is {passive} by {agent} in {place}",
    "in {place}, {thing} is {passive} by {agent} on {day}",
)

Form = tuple[int, int]  # which order, which verb


@dataclass(frozen=True)
class ParaphraseQuestion(Question):
    """A sentence that means the same scores half for another verb and half for another order; any other scores 0."""

    forms: dict[Form, str]
    source: Form

    def grade(self, text: str, strict: bool = False) -> float:
        for form, sentence in self.forms.items():
            if text.strip() == sentence if strict else last_line(text) == last_line(sentence):
                return ((form[0] != self.source[0]) + (form[1] != self.source[1])) / 2
        return 0.0

    def draw(self, rng: random.Random) -> str:
        return draw_form(rng, self.forms, self.source)


def draw_form(rng: random.Random, forms: dict[Form, str], source: Form) -> str:
    """A form with another order and another verb than the source."""
    return rng.choice([text for form, text in forms.items() if form[0] != source[0] and form[1] != source[1]])


@dataclass(frozen=True)
class ParaphraseTask(BenchTask):
    """A size is the number of sentences; there is one."""

    def ask(self, rng: random.Random, size: int) -> ParaphraseQuestion:
        facts = {
            "agent": f"the {rng.choice(JOBS)}",
            "thing": f"the {rng.choice([noun for topic in EVERYDAY.values() for noun in topic])}",
            "place": rng.choice(CITIES),
            "day": rng.choice(DAYS),
        }
        verbs = rng.choice(SYNONYMS)
        forms = {
            (i, j): written(order.format(active=active, passive=passive, **facts))
            for i, order in enumerate(ORDERS)
            for j, (active, passive) in enumerate(verbs)
        }
        source = rng.choice(list(forms))
        same = " and ".join(f"{active} (is {passive} by)" for active, passive in verbs)
        request = f"Say the same with another verb and in another order. Leave nothing out. Alike are {same}."
        prompt = f"{request}\n{forms[source]}"
        return ParaphraseQuestion(self.name, prompt, draw_form(rng, forms, source), forms, source)


# --- summaries ---------------------------------------------------------------------------------------------------

SUMMARIES = (
    "{first} and {second} will {activity} at the {place} on {day}",
    "{first} and {second} will {activity} on {day} at the {place}",
    "on {day}, {first} and {second} will {activity} at the {place}",
)

CHATTER = (
    "My sister is well again.", "What a lot of rain we had!", "I am so tired today.",
    "My bus was late again.", "I have to buy new shoes.", "The neighbours are noisy.", "That soup was good.",
)  # fmt: skip


@dataclass(frozen=True)
class SummaryQuestion(Question):
    """Scores 1 for one of the forms of what was agreed last: names in both orders, place and day in three."""

    forms: tuple[str, ...]

    def grade(self, text: str, strict: bool = False) -> float:
        if strict:
            return float(text.strip() in self.forms)
        return float(last_line(text) in map(last_line, self.forms))

    def draw(self, rng: random.Random) -> str:
        return rng.choice(self.forms)


@dataclass(frozen=True)
class SummaryTask(BenchTask):
    """A talk of two people about a plan; a size is how often they change it."""

    def ask(self, rng: random.Random, size: int) -> SummaryQuestion:
        people, activity = rng.sample(FIRST_NAMES, 2), rng.choice(ACTIVITIES)
        days, places = rng.sample(DAYS, size + 1), rng.sample(PLACES, size + 1)
        day, place = days.pop(), places.pop()
        turns = [f"Shall we {activity} at the {place} on {day}?"]
        for _ in range(size):
            if rng.random() < 0.5:
                old, day = day, days.pop()
                turns.append(f"I cannot come on {old}. {day} is better.")
            else:
                old, place = place, places.pop()
                turns.append(f"The {old} is too far. Let us go to the {place}.")
        turns.append("I am looking forward to it.")
        for remark in rng.sample(CHATTER, 2):
            turns.insert(rng.randint(1, len(turns)), remark)
        talk = "\n".join(f"{people[i % 2]}: {turn}" for i, turn in enumerate(turns))
        forms = tuple(
            written(form.format(first=first, second=second, activity=activity, place=place, day=day))
            for first, second in permutations(people)
            for form in SUMMARIES
        )
        request = "What did they agree on? Write one sentence: NAME and NAME will DO THIS at the PLACE on DAY."
        prompt = f"{talk}\n{request}"
        return SummaryQuestion(self.name, prompt, rng.choice(forms), forms)


def writing_tasks() -> dict[str, BenchTask]:
    """The five tasks, by name."""
    tasks: tuple[BenchTask, ...] = (
        SentenceTask("words_to_sentence_easy", (4,), PER_TASK, EVERYDAY, related=True),
        SentenceTask("words_to_sentence_medium", (4,), PER_TASK, EVERYDAY, related=False),
        SentenceTask("words_to_sentence_hard", (4,), PER_TASK, RARE, related=False),
        ParaphraseTask("paraphrase", (1,), PER_TASK),
        SummaryTask("summarise", (0, 1, 2, 3), PER_TASK // 4),
    )
    return {task.name: task for task in tasks}
