"""The model card: how a model was made, and what it can do, measured on held-out examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hasten.documents import dumps
from hasten.engine import SamplingParams
from hasten.files import write_text
from hasten.llm import LLM
from hasten.model import Rows
from hasten.tasks import TASKS, Example, examples, prose_chunks

EVALUATION_SEED = 7
SOURCE = "its own\nprocedural tasks and on the text of the Python standard library"
"""What models are trained on, as a card says it."""
LENGTHS = ((0, 128), (128, 256), (256, 512), (512, 1024))


def task_scores(
    llm: LLM, per_task: int, report: Callable[[int], None] = lambda done: None, method: str = "plain"
) -> dict[str, dict[str, Any]]:
    """Share of held-out examples answered right (greedy), per task, and by length of prompt and answer in tokens.

    Beside it stand the tokens of all answers, and the forward passes they took.
    """
    room = llm.model.config.max_positions
    scores: dict[str, dict[str, Any]] = {}
    for name, task in TASKS.items():
        held_out = [e for e in examples(name, "test", per_task, EVALUATION_SEED)]
        lengths = [len(llm.encode(e.prompt + e.answer)) + 1 for e in held_out]
        fitting = [(e, length) for e, length in zip(held_out, lengths, strict=True) if length < room]
        params = [SamplingParams(max_tokens=budget(llm, e)) for e, _ in fitting]
        answers = llm.generate([e.prompt for e, _ in fitting], params, method)
        right = [task.grade(e, answer.text) for (e, _), answer in zip(fitting, answers, strict=True)]
        by_length = {}
        for low, high in LENGTHS:
            inside = [ok for ok, (_, length) in zip(right, fitting, strict=True) if low <= length < high]
            if inside:
                by_length[f"{low}-{high}"] = [sum(inside), len(inside)]
        scores[name] = {
            "category": task.category,
            "right": sum(right),
            "of": len(right),
            "tokens": sum(answer.choices[0].statistics.tokens for answer in answers),
            "steps": sum(answer.choices[0].statistics.steps for answer in answers),
            "by_length": by_length,
        }
        report(1)
    return scores


def decoded_scores(
    models: Iterable[tuple[str, Path, Sequence[str]]], per_task: int, report: Callable[[int], None] = lambda done: None
) -> dict[str, dict[str, Any]]:
    """Task scores of several models, each by several methods; each model is loaded once.

    Args:
        models: of each what stands before its methods' names, its folder, and the methods. One without methods is none.

    Returns:
        By label and method, as `task_scores` has them.
    """
    scores: dict[str, dict[str, Any]] = {}
    for label, folder, methods in models:
        if methods:
            llm = LLM(folder, dtype="float32")
            scores |= {label + method: task_scores(llm, per_task, report, method) for method in methods}
    return scores


def budget(llm: LLM, example: Example) -> int:
    """New tokens for an answer: what it needs and 16 more, rounded up to a power of two.

    To a model that fills a canvas its size says next to nothing.
    """
    return 1 << (len(llm.encode(example.answer)) + 15).bit_length()


@torch.inference_mode()
def perplexity(llm: LLM, chunks: int = 60) -> float:
    """exp of the mean negative log-likelihood per token of held-out prose, each chunk on its own."""
    total, count = 0.0, 0
    for text in list(prose_chunks("test"))[:chunks]:
        ids = llm.encode(text)[: llm.model.config.max_positions]
        if len(ids) < 2:
            continue
        sequence = llm.engine.cache.sequence()
        logits = llm.model.forward(Rows.of(sequence, ids, 0, llm.model.device))
        sequence.release()
        total += float(F.cross_entropy(logits[:-1], torch.tensor(ids[1:], device=logits.device), reduction="sum"))
        count += len(ids) - 1
    return math.exp(total / count)


def write_card(
    folder: Path, summary: dict[str, Any], command: str, per_task: int, report: Callable[[int], None]
) -> Path:
    """Score the model in `folder` and write `README.md` and `card.json` there.

    Args:
        summary: what training returned.
        command: the command line that made the model.
        per_task: held-out examples of each task.
    """
    llm = LLM(folder, dtype="float32")
    document = {
        "command": command,
        **summary,
        "tasks": task_scores(llm, per_task, report),
        "prose_perplexity": round(perplexity(llm), 3),
    }
    return save_card(folder, document, render(folder.name, document))


def save_card(folder: Path, document: Mapping[str, Any], text: str) -> Path:
    """Write a card: `card.json`, and for readers `README.md`, whose path it returns.

    Raises:
        UserError: it cannot be written.
    """
    write_text(folder / "card.json", dumps(document, indent=2) + "\n")
    card = folder / "README.md"
    write_text(card, text)
    return card


def opening(name: str, document: Mapping[str, Any], what: str) -> list[str]:
    """A card's first half: what the model is, and how it was made."""
    return [
        f"# {name}",
        "",
        f"{what} For testing and comparing decoding methods;",
        "not for facts or advice.",
        "",
        "## How it was made",
        "",
        f"    {document['command']}",
        "",
        f"{document['tokens']:,} tokens in {document['seconds']:,.0f} s; final training loss {document['loss']} nats;",
        f"SHA-256 of the data stream `{document['data_sha256'][:16]}`.",
    ]


def by_category(tasks: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Tasks and their scores in the order of a card's table."""
    return sorted(tasks.items(), key=lambda item: (item[1]["category"], item[0]))


def percent(part: int, whole: int) -> str:
    """A share as a card says it; nothing of nothing."""
    return f"{100 * part / whole:.0f} %" if whole else ""


def render(name: str, document: dict[str, Any]) -> str:
    """The card as Markdown."""
    what = (
        f"A Llama-architecture language model of {document['parameters']:,} parameters, trained by hasten on {SOURCE}."
    )
    lines = [
        *opening(name, document, what),
        "",
        "## What it can do",
        "",
        "Exact answers on held-out examples, greedy, float32; by length of prompt and answer in tokens.",
        "",
        "| category | task | right | " + " | ".join(f"{low}-{high}" for low, high in LENGTHS) + " |",
        "|---|---|---|" + "---|" * len(LENGTHS),
    ]
    for task, score in by_category(document["tasks"]):
        cells = []
        for low, high in LENGTHS:
            pair = score["by_length"].get(f"{low}-{high}")
            cells.append("" if pair is None else f"{percent(*pair)} of {pair[1]}")
        share = percent(score["right"], score["of"])
        lines.append(f"| {score['category']} | {task} | {share} | " + " | ".join(cells) + " |")
    lines += ["", f"Perplexity per token on held-out prose: {document['prose_perplexity']}.", ""]
    return "\n".join(lines)
