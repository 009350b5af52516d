"""The card of an adapted model: what it predicts where answers are hidden, and what it answers when it is decoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hasten.model.checkpoint import resolve
from hasten.tasks import TASKS, examples
from hasten.train.card import EVALUATION_SEED, LENGTHS, by_category, decoded_scores, opening, percent, save_card
from hasten.train.data import IGNORE, Document, group, pad
from hasten.train.diffusion.adapt import Adaptation, Text, ceil_to
from hasten.train.diffusion.corruption import exactly
from hasten.train.diffusion.layout import load
from hasten.train.tokenizer import load_tokenizer

SHARES = (1.0, 0.5)
"""Of an answer and its padding that is hidden."""
PADDING = 8
"""Answers are followed by end tokens up to a multiple of this length."""


@torch.inference_mode()
def masked_accuracy(
    recipe: Adaptation, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str, per_task: int
) -> dict[str, Any]:
    """How held-out answers of the task `name` are predicted in one forward pass, given the rest of them.

    Returns:
        category, number of answers `of` that fit the recipe's lengths, and for each share in `SHARES` the hidden tokens
        predicted right, their number, and the answers of which all were.
    """
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    end = int(tokenizer.eos_token_id)
    documents = [Document.of(example, encode, end) for example in examples(name, "test", per_task, EVALUATION_SEED)]
    longest = recipe.answers or recipe.context
    fitting = [d for d in documents if len(d.ids) <= recipe.context and len(d.ids) - d.answer - 1 <= longest]
    fitting.sort(key=lambda document: len(document.ids))
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    counts = {share: [0, 0, 0] for share in SHARES}
    for rows in group(fitting, recipe.batch_tokens) if fitting else ():
        batch = pad(rows, end)
        text = Text.of(batch, ceil_to(batch.ids.shape[1], PADDING), end)
        for share, count in counts.items():
            hidden = exactly(text.answer, (share * text.answer.sum(1)).ceil().long(), generator)
            right = hidden.clone()
            right[hidden] = recipe.predict(model, text, hidden, hidden).argmax(-1) == text.ids[hidden]
            asked = hidden & (text.labels != IGNORE)
            count[0] += int((right & asked).sum())
            count[1] += int(asked.sum())
            count[2] += int((right | ~asked).all(1).sum())
    shares = {f"{share:.0%}": count for share, count in counts.items()}
    return {"category": TASKS[name].category, "of": len(fitting), "hidden": shares}


def scored_models(recipe: Adaptation, folder: Path) -> list[tuple[str, Path, tuple[str, ...]]]:
    """What is put before the decoders' names, folder and decoders of the models that are decoded.

    These are the new one and its parent: with the same decoders where the recipe asks for a comparison, else with those
    of a model that reads from left to right, if the new one still is such a model: what its adaptation cost.
    """
    parent = resolve(recipe.parent)
    shared = recipe.decoders if recipe.compared else tuple(d for d in recipe.decoders if d == "plain")
    return [("", folder, recipe.decoders), (f"{parent.name}, ", parent, shared)]


def write_card(
    recipe: Adaptation,
    folder: Path,
    summary: dict[str, Any],
    command: str,
    per_task: int,
    report: Callable[[int], None] = lambda done: None,
) -> Path:
    """Score the model in `folder` and write `README.md` and `card.json` there.

    Args:
        recipe: it was trained with.
        folder: of the model.
        summary: what training returned.
        command: the command line that made the model.
        per_task: held-out examples of each task.
        report: told after each task that was decoded.
    """
    model, tokenizer = load(folder), load_tokenizer(folder)
    tasks = {name: masked_accuracy(recipe, model, tokenizer, name, per_task) for name in TASKS}
    decoded = decoded_scores(scored_models(recipe, folder), per_task, report)
    document = {
        "command": command, "parent": resolve(recipe.parent).name, **summary, "tasks": tasks, "decoded": decoded
    }  # fmt: skip
    return save_card(folder, document, render(folder.name, document, recipe))


def render(name: str, document: dict[str, Any], recipe: Adaptation) -> str:
    """The card as Markdown."""
    what = (
        f"A language model of {document['parameters']:,} parameters that fills masked positions ({recipe.attention}\n"
        f"attention, {recipe.alignment} alignment), adapted by hasten from `{document['parent']}` on {recipe.source}."
    )
    lines = opening(name, document, what)
    if "asked" in document:
        lines.append(f"The teacher answered {document['right']:,} of {document['asked']:,} questions right.")
    lines += [
        "",
        "## What it can do",
        "",
        "Exact answers on held-out examples, greedy, float32, and tokens per forward pass:",
        "",
        "| decoder | right | tokens per pass |",
        "|---|---|---|",
        *[f"| `{method}` | " + " | ".join(_total(scores)) + " |" for method, scores in document["decoded"].items()],
        "",
        "Of these, by length of prompt and answer in tokens:",
        "",
        "| decoder | " + " | ".join(f"{low}-{high}" for low, high in LENGTHS) + " |",
        "|---|" + "---|" * len(LENGTHS),
        *[f"| `{method}` | " + " | ".join(_lengths(scores)) + " |" for method, scores in document["decoded"].items()],
        "",
        "By task and decoder; then, of the same answers, what is right in one forward pass with all or half of their",
        "positions hidden: tokens, and whole answers.",
        "",
        "| category | task | "
        + " | ".join([f"`{method}`" for method in document["decoded"]])
        + " | "
        + " | ".join(f"{share:.0%} hidden: tokens | answers" for share in SHARES)
        + " |",
        "|---|---|" + "---|" * (len(document["decoded"]) + 2 * len(SHARES)),
    ]
    for task, score in by_category(document["tasks"]):
        cells = [percent(scores[task]["right"], scores[task]["of"]) for scores in document["decoded"].values()]
        for right, asked, answers in score["hidden"].values():
            cells += [percent(right, asked), percent(answers, score["of"])]
        lines.append(f"| {score['category']} | {task} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _total(scores: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """Right answers and tokens per pass over all tasks."""
    right, of, tokens, steps = (
        sum(score[name] for score in scores.values()) for name in ("right", "of", "tokens", "steps")
    )
    return percent(right, of), f"{tokens / max(1, steps):.2f}"


def _lengths(scores: dict[str, dict[str, Any]]) -> list[str]:
    """Right answers over all tasks, for each of `LENGTHS`."""
    cells = []
    for low, high in LENGTHS:
        pairs = [score["by_length"].get(f"{low}-{high}", (0, 0)) for score in scores.values()]
        right, of = map(sum, zip(*pairs, strict=True))
        cells.append(f"{percent(right, of)} of {of}" if of else "")
    return cells
