"""The card of a model for lexical unit decoding: what it answers token by token and span by span, beside its parent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hasten.model.checkpoint import resolve
from hasten.train.card import by_category, decoded_scores, opening, save_card
from hasten.train.lud.recipe import LexicalUnits

BETAS = (0.99, 0.95, 0.9, 0.8, 0.6)


def scored_models(recipe: LexicalUnits, folder: Path) -> list[tuple[str, Path, tuple[str, ...]]]:
    """What a card's scores are of: the parent and the model in the folder, as `decoded_scores` has them."""
    parent, spans = resolve(recipe.parent), [f"lud:beta={beta}" for beta in BETAS] if recipe.mix else []
    return [(f"{parent.name}, ", parent, ("plain",)), ("", folder, ("plain", *spans))]


def write_card(
    recipe: LexicalUnits,
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
    decoded = decoded_scores(scored_models(recipe, folder), per_task, report)
    document = {"command": command, "parent": resolve(recipe.parent).name, **summary, "decoded": decoded}
    return save_card(folder, document, render(folder.name, document))


def render(name: str, document: dict[str, Any]) -> str:
    """The card as Markdown."""
    config, decoded = document["config"], document["decoded"]
    taught = (
        f"to say up to {config['placeholders']} tokens behind the next one from placeholders (LUD)."
        if config["mix"]
        else "and on nothing else: a control\nfor one that says several tokens at once."
    )
    what = (
        f"A Llama-architecture language model of {document['parameters']:,} parameters, trained by hasten from "
        f"`{document['parent']}`\non that model's own answers, {taught}"
    )
    lines = [
        *opening(name, document, what),
        "",
        "## What it can do",
        "",
        "Exact answers on held-out examples, greedy, float32, and tokens per forward pass:",
        "",
        "| decoder | right | tokens per pass |",
        "|---|---|---|",
        *[f"| `{method}` | " + " | ".join(_told(scores.values())) + " |" for method, scores in decoded.items()],
        "",
        "By task:",
        "",
        "| category | task | " + " | ".join(f"`{method}`" for method in decoded) + " |",
        "|---|---|" + "---|" * len(decoded),
    ]
    for task, score in by_category(decoded["plain"]):
        cells = [", ".join(_told([scores[task]])) for scores in decoded.values()]
        lines.append(f"| {score['category']} | {task} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _told(scores: Iterable[dict[str, Any]]) -> tuple[str, str]:
    """Right answers and tokens per pass over some tasks."""
    right, of, tokens, steps = (
        sum(column) for column in zip(*((s["right"], s["of"], s["tokens"], s["steps"]) for s in scores), strict=True)
    )
    return f"{right} of {of}", f"{tokens / max(1, steps):.2f}"
