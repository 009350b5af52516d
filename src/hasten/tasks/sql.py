"""Questions about one table, each answered by one SQL statement: repetitive output, as of an agent."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .base import PROMPT_END, Example, Task, pick_size, register
from .words import CITIES, FIRST_NAMES, LIST_WORDS

NAMES, PLACES, WORDS = FIRST_NAMES, CITIES, LIST_WORDS


@dataclass(frozen=True)
class Table:
    """Columns with numbers, and columns with text and the values it may have."""

    name: str
    numbers: tuple[str, ...]
    texts: dict[str, tuple[str, ...]]


TABLES = (
    Table("users", ("age", "score", "visits"), {"name": NAMES, "city": PLACES, "team": WORDS}),
    Table("orders", ("price", "amount", "day"), {"product": WORDS, "customer": NAMES, "city": PLACES}),
    Table("products", ("price", "stock", "weight"), {"name": WORDS, "color": WORDS[:8], "maker": NAMES}),
    Table("films", ("year", "length", "rating"), {"title": WORDS, "director": NAMES, "place": PLACES}),
    Table("cities", ("people", "area", "height"), {"name": PLACES, "mayor": NAMES, "flag": WORDS[:8]}),
    Table("books", ("pages", "year", "price"), {"title": WORDS, "author": NAMES, "city": PLACES}),
    Table("animals", ("age", "weight", "legs"), {"kind": WORDS[16:26], "owner": NAMES, "color": WORDS[:8]}),
    Table("flights", ("price", "seats", "hour"), {"origin": PLACES, "target": PLACES, "pilot": NAMES}),
)

COMPARISONS = (("over", ">"), ("under", "<"), ("at least", ">="), ("at most", "<="), ("equal to", "="))
TOTALS = (("average", "AVG"), ("highest", "MAX"), ("lowest", "MIN"), ("total", "SUM"))

Question = tuple[str, str]


def columns(rng: random.Random, table: Table) -> Question:
    names = rng.sample([*table.numbers, *table.texts], rng.randint(1, 3))
    return " and ".join(names), ", ".join(names)


def condition(rng: random.Random, table: Table) -> Question:
    if rng.random() < 0.5:
        column = rng.choice(table.numbers)
        words, sign = rng.choice(COMPARISONS)
        value = rng.randint(1, 99)
        return f"where {column} is {words} {value}", f"WHERE {column} {sign} {value}"
    column = rng.choice(list(table.texts))
    text = rng.choice(table.texts[column])
    return f"where {column} is {text}", f"WHERE {column} = '{text}'"


def select(rng: random.Random, table: Table) -> Question:
    (words, names), (where, clause) = columns(rng, table), condition(rng, table)
    return f"Show {words} {where}.", f"SELECT {names} FROM {table.name} {clause};"


def order(rng: random.Random, table: Table) -> Question:
    (words, names), column = columns(rng, table), rng.choice(table.numbers)
    way, sign = rng.choice((("from low to high", "ASC"), ("from high to low", "DESC")))
    return (
        f"Show {words} sorted by {column} {way}.",
        f"SELECT {names} FROM {table.name} ORDER BY {column} {sign};",
    )


def top(rng: random.Random, table: Table) -> Question:
    (words, names), column, count = columns(rng, table), rng.choice(table.numbers), rng.randint(2, 20)
    side, sign = rng.choice((("lowest", "ASC"), ("highest", "DESC")))
    return (
        f"Show {words} of the {count} rows with the {side} {column}.",
        f"SELECT {names} FROM {table.name} ORDER BY {column} {sign} LIMIT {count};",
    )


def count(rng: random.Random, table: Table) -> Question:
    where, clause = condition(rng, table)
    return f"Count the rows {where}.", f"SELECT COUNT(*) FROM {table.name} {clause};"


def total(rng: random.Random, table: Table) -> Question:
    (words, function), column = rng.choice(TOTALS), rng.choice(table.numbers)
    where, clause = condition(rng, table)
    return f"Show the {words} {column} {where}.", f"SELECT {function}({column}) FROM {table.name} {clause};"


def group(rng: random.Random, table: Table) -> Question:
    (words, function), column = rng.choice(TOTALS), rng.choice(table.numbers)
    key = rng.choice(list(table.texts))
    return (
        f"Show the {words} {column} for each {key}.",
        f"SELECT {key}, {function}({column}) FROM {table.name} GROUP BY {key};",
    )


QUESTIONS: tuple[Callable[[random.Random, Table], Question], ...] = (select, order, top, count, total, group)


@register
class Sql(Task):
    name = "sql"
    category = "sql"
    title = "Answer questions about a table, one SQL statement a line"

    def generate(self, rng: random.Random, difficulty: float) -> Example:
        full = rng.choice(TABLES)
        # A part of the columns, in any order: 4 to 6 of them, so the same name seldom has the same table.
        numbers = tuple(rng.sample(full.numbers, rng.randint(2, 3)))
        texts = {column: full.texts[column] for column in rng.sample(list(full.texts), rng.randint(2, 3))}
        table = Table(full.name, numbers, texts)
        asked = [rng.choice(QUESTIONS)(rng, table) for _ in range(pick_size(rng, 1, 6, difficulty))]
        header = f"Table {table.name}: {', '.join(rng.sample([*numbers, *texts], len(numbers) + len(texts)))}"
        lines = [f"{i}. {question}" for i, (question, _) in enumerate(asked, 1)]
        prompt = "\n".join([header, "Write one SQL statement per line.", *lines]) + PROMPT_END
        return Example(self.name, prompt, "\n" + "\n".join(statement for _, statement in asked))

    def grade(self, example: Example, output: str) -> bool:
        return normal(output) == normal(example.answer)


def normal(text: str) -> list[str]:
    """The statements of a text, without what does not matter: blank lines, repeated spaces, semicolons."""
    lines = (" ".join(line.split()).rstrip("; ") for line in text.splitlines())
    return [line for line in lines if line]
