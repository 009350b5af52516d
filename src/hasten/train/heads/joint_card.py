"""The card of a model that learnt with its heads: how far it is from what it was, and what it can still do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.train.card import by_category, opening, percent, save_card

Scores = dict[str, dict[str, Any]]


def write_joint_card(
    folder: Path, document: Mapping[str, Any], distance: Mapping[str, Any], before: Scores, now: Scores
) -> Path:
    """Write `README.md` and `card.json`.

    Args:
        document: summary of the run, with its `command` and the `parent`'s name.
        distance: `rows` of dialogues that were held out, and there the mean KL(parent || this) in nats (`kl`) and how
            often both find the same token likeliest (`top1`).
        before, now: task scores of the parent and of the model in the folder.

    Raises:
        UserError: they cannot be written.
    """
    whole = {**document, "distance": dict(distance), "parent_tasks": before, "tasks": now}
    return save_card(folder, whole, render(folder.name, whole))


def total(scores: Scores) -> tuple[int, int]:
    """Right answers of all tasks, and questions."""
    return sum(score["right"] for score in scores.values()), sum(score["of"] for score in scores.values())


def render(name: str, document: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    distance, parent = document["distance"], document["parent"]
    what = f"`{parent}`, which learnt together with the Medusa heads in `heads/medusa` (Medusa-2, 2401.10774)."
    sums = [percent(*total(document[scores])) for scores in ("parent_tasks", "tasks")]
    lines = [
        *opening(name, document, what),
        "",
        "## How far it is from what it was",
        "",
        f"It is another model than `{parent}`. Decoding with its heads gives its own tokens, not those of `{parent}`.",
        f"On {distance['rows']:,} rows of dialogues that were held out, KL({parent} || {name}) is {distance['kl']:.5f}",
        f"nats in the mean, and both find the same token likeliest at {100 * distance['top1']:.2f} % of them.",
        "",
        "Exact answers on held-out examples, greedy, float32:",
        "",
        f"| category | task | `{parent}` | `{name}` |",
        "|---|---|---|---|",
    ]
    for task, score in by_category(document["tasks"]):
        was = document["parent_tasks"][task]
        cells = percent(was["right"], was["of"]), percent(score["right"], score["of"])
        lines.append(f"| {score['category']} | {task} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, f"| all | | {sums[0]} | {sums[1]} |", ""])
