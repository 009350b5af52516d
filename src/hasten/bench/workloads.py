"""Workloads made of the shipped tasks: Spec-Bench's categories, redundant second turns, an agent's steps, prose.

Every question in them is of the held-out split, and the same on every machine (prose follows the Python version). They
are what a small model can do of the kinds of text that acceleration is judged on: Spec-Bench (2401.07851), MT-Redundant
(CopySpec, 2502.08923) and agents' repetitive output (SuffixDecoding, 2411.04975).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from hasten.bench.prompts import BenchPrompt
from hasten.tasks import TASKS, Example, examples, prose_chunks, split_of
from hasten.tasks.base import PROMPT_END
from hasten.tasks.edit import Edit, draw_lines
from hasten.tasks.sql import QUESTIONS, TABLES, Table
from hasten.tasks.words import ALL_WORDS

SEED = 20_26
DIFFICULTY = 0.5
"""Half of the tasks' largest sizes: what a small model mostly gets right."""
TRIES = 16
"""Variations drawn of one answer before another first turn is tried."""

SPEC: dict[str, tuple[str, ...]] = {
    "translation": ("sql", "bio", "replace"),
    "summarisation": ("copy", "remove", "json"),
    "qa": ("multihop", "python"),
    "math": ("addition", "subtraction", "multiplication"),
    "retrieval": ("lookup", "needle"),
}
"""Spec-Bench's categories but `multi-turn`, and the tasks that stand for each: text turned word by word into other
text, text taken over in whole or in part, questions, sums, and finding passages."""

UNRELATED = ("addition", "subtraction", "multiplication", "multihop", "sort")
"""What controls ask: their answers repeat no passage."""

Build = Callable[[random.Random], Example]
Variation = Callable[[str, random.Random], Example]


def graded(category: str, example: Example) -> BenchPrompt:
    """A task's example as a prompt of a category."""
    return BenchPrompt(category, example.task, example.prompt, partial(TASKS[example.task].grade, example))


def held_out(build: Build, rng: random.Random) -> Example:
    """The first example drawn that is of the held-out split; one in sixteen is."""
    while True:
        example = build(rng)
        if split_of(example.prompt) == "test":
            return example


def task(name: str) -> Build:
    """Draws from one task."""
    return lambda rng: TASKS[name].generate(rng, DIFFICULTY)


# Spec-Bench's categories


def spec(count: int) -> list[BenchPrompt]:
    """`count` prompts of each of Spec-Bench's six categories."""
    prompts = [
        BenchPrompt("multi-turn", item.task, item.prompt, item.grade) for item in redundant(count)[: 2 * count : 2]
    ]
    for category, names in SPEC.items():
        streams = [examples(name, "test", count, SEED, DIFFICULTY) for name in names]
        prompts += [graded(category, next(streams[number % len(streams)])) for number in range(count)]
    return prompts


# MT-Redundant


def redundant(count: int) -> list[BenchPrompt]:
    """`count` second turns of each of eight kinds, which ask for a variation of the first answer, and as many controls.

    The second turn quotes the first answer, which is the right one, not the model's: every model and method reads the
    same prompts. A control asks for something else, and its answer repeats no passage.
    """
    rng = random.Random(f"redundant/{SEED}")
    prompts = []
    for _ in range(count):
        for first_turn, variation in VARIATIONS:
            prompts.append(graded("redundant", conversation(first_turn, variation, rng)[1]))
            prompts.append(graded("control", held_out(task(rng.choice(UNRELATED)), rng)))
    return prompts


def conversation(first_turn: Build, variation: Variation, rng: random.Random) -> tuple[Example, Example]:
    """Two turns, both of the held-out split. A short answer has few variations, perhaps none held out."""
    while True:
        first = held_out(first_turn, rng)
        for _ in range(TRIES):
            second = variation(first.answer, rng)
            if split_of(second.prompt) == "test":
                return first, second


def change_of(*kinds: str) -> Variation:
    """A second turn: a change, of one of these kinds, to the text that was the first answer."""

    def build(text: str, rng: random.Random) -> Example:
        lines = text.strip().split("\n")
        change, edited = getattr(Edit(), rng.choice(kinds))(rng, lines)
        return edit(lines, change, edited)

    return build


def edit(lines: list[str], change: str, edited: list[str]) -> Example:
    """An example of the `edit` task."""
    question = "Text:\n" + "\n".join(lines) + f"\nChange: {change}"
    return Example("edit", question + PROMPT_END, "\n" + "\n".join(edited))


def insert(text: str, rng: random.Random) -> Example:
    """A second turn: the list that was the first answer, with a new word in it."""
    items = text.split()
    place, new = rng.randrange(len(items)), rng.choice(_others(items))
    answer = [*items[: place + 1], new, *items[place + 1 :]]
    return _list("insert", f"Insert {new} after {items[place]} in the list", items, answer)


def remove(text: str, rng: random.Random) -> Example:
    """A second turn: the list that was the first answer, without one of its words."""
    items = text.split()
    word = rng.choice(items)
    return _list("remove", f"Remove {word} from the list", items, [item for item in items if item != word])


def replace(text: str, rng: random.Random) -> Example:
    """A second turn: the list that was the first answer, with another word in place of one."""
    items = text.split()
    word, new = rng.choice(items), rng.choice(_others(items))
    answer = [new if item == word else item for item in items]
    return _list("replace", f"Replace {word} by {new} in the list", items, answer)


def _others(items: list[str]) -> list[str]:
    return [word for word in ALL_WORDS if word not in items]


def _list(name: str, request: str, items: list[str], answer: list[str]) -> Example:
    return Example(name, f"{request}: {' '.join(items)}{PROMPT_END}", " " + " ".join(answer))


VARIATIONS: tuple[tuple[Build, Variation], ...] = (
    (task("edit"), change_of("replace")),
    (task("edit"), change_of("rename")),
    (task("edit"), change_of("set_value")),
    (task("edit"), change_of("append")),
    (task("edit"), change_of("delete_text")),
    (task("insert"), insert),
    (task("remove"), remove),
    (task("replace"), replace),
)
"""First turns, and the variation of their answers that the second turn asks for."""


# An agent

PATCH = change_of("replace", "set_value", "append", "delete_text")


def agent(count: int) -> list[BenchPrompt]:
    """`count` sessions of an agent, each of eight requests that share their templates with those of all sessions.

    Two extract records as JSON, three query one table in SQL, and three patch a file, each time what the patch before
    it left.
    """
    rng = random.Random(f"agent/{SEED}")
    prompts = []
    for _ in range(count):
        prompts += [graded("extract", held_out(task("json"), rng)) for _ in range(2)]
        table = rng.choice(TABLES)
        columns = rng.sample([*table.numbers, *table.texts], len(table.numbers) + len(table.texts))
        prompts += [graded("query", held_out(partial(query, table, columns), rng)) for _ in range(3)]
        text = "\n".join(draw_lines(rng, rng.randint(6, 12)))
        for _ in range(3):
            patch = held_out(partial(PATCH, text), rng)
            prompts.append(graded("patch", patch))
            text = patch.answer.strip()
    return prompts


def query(table: Table, columns: list[str], rng: random.Random) -> Example:
    """An example of the `sql` task about a given table: two to four questions."""
    asked = [rng.choice(QUESTIONS)(rng, table) for _ in range(rng.randint(2, 4))]
    questions = [f"{number}. {question}" for number, (question, _) in enumerate(asked, 1)]
    header = f"Table {table.name}: {', '.join(columns)}"
    prompt = "\n".join([header, "Write one SQL statement per line.", *questions]) + PROMPT_END
    return Example("sql", prompt, "\n" + "\n".join(statement for _, statement in asked))


# Prose

PROSE_CHARACTERS = 900
"""Length of a piece, at most."""


def prose(count: int) -> list[BenchPrompt]:
    """`count` pieces of held-out files of Python's library, to be continued freely.

    The control on which speculation earns least: nothing says what comes next but the model.
    """
    chunks = [chunk for chunk in prose_chunks("test", PROSE_CHARACTERS) if len(chunk) > PROSE_CHARACTERS // 2]
    chosen = random.Random(f"prose/{SEED}").sample(chunks, min(count, len(chunks)))
    return [BenchPrompt("prose", "prose", chunk, None) for chunk in chosen]
