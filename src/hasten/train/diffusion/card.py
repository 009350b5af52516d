"""The card of an adapted model: what it predicts where answers are hidden, and what it answers when it is decoded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hasten.llm import LLM
from hasten.model.checkpoint import resolve
from hasten.tasks import TASKS, examples
from hasten.train.card import EVALUATION_SEED, task_scores
from hasten.train.data import IGNORE, Document, group, pad
from hasten.train.diffusion.adapt import Adaptation, Text, ceil_to
from hasten.train.diffusion.corruption import exactly
from hasten.train.diffusion.layout import load
from hasten.train.tokenizer import load_tokenizer

SHARES = (1.0, 0.5)
"""Of an answer and its padding that is hidden."""
DECODERS = {
    ("full", "same"): ("threshold",),
    ("block-causal", "shifted"): ("fast-dllm-v2:part=0",),
    ("context-causal", "shifted"): ("plain", "nbdiff"),
    ("context-causal", "same"): ("plain", "threshold"),
}
"""How models are decoded to be scored; `plain` is autoregressive here."""
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
    model.config.diffusion = recipe.section(int(tokenizer.mask_token_id))
    tasks = {name: masked_accuracy(recipe, model, tokenizer, name, per_task) for name in TASKS}
    llm = LLM(folder, dtype="float32")
    decoded = {}
    for method in DECODERS[recipe.attention, recipe.alignment]:
        decoded[method] = task_scores(llm, per_task, report, method)
    document = {
        "command": command, "parent": resolve(recipe.parent).name, **summary, "tasks": tasks, "decoded": decoded
    }  # fmt: skip
    (folder / "card.json").write_text(json.dumps(document, indent=2) + "\n")
    card = folder / "README.md"
    card.write_text(render(folder.name, document, recipe))
    return card


def render(name: str, document: dict[str, Any], recipe: Adaptation) -> str:
    """The card as Markdown."""
    lines = [
        f"# {name}",
        "",
        f"A language model of {document['parameters']:,} parameters that fills masked positions ({recipe.attention}",
        f"attention, {recipe.alignment} alignment), adapted by hasten from `{document['parent']}` on its own",
        "procedural tasks and on the text of the Python standard library. For testing and comparing decoding methods;",
        "not for facts or advice.",
        "",
        "## How it was made",
        "",
        f"    {document['command']}",
        "",
        f"{document['tokens']:,} tokens in {document['seconds']:,.0f} s; final training loss {document['loss']} nats;",
        f"SHA-256 of the data stream `{document['data_sha256'][:16]}`.",
        "",
        "## What it can do",
        "",
        "Exact answers on held-out examples, greedy, float32, by decoder; then, of the same answers, what is right in",
        "one forward pass with all or half of their positions hidden: tokens, and whole answers.",
        "",
        "| category | task | "
        + " | ".join([f"`{method}`" for method in document["decoded"]])
        + " | "
        + " | ".join(f"{share:.0%} hidden: tokens | answers" for share in SHARES)
        + " |",
        "|---|---|" + "---|" * (len(document["decoded"]) + 2 * len(SHARES)),
    ]
    for task, score in sorted(document["tasks"].items(), key=lambda item: (item[1]["category"], item[0])):
        cells = [_percent(scores[task]["right"], scores[task]["of"]) for scores in document["decoded"].values()]
        for right, asked, answers in score["hidden"].values():
            cells += [_percent(right, asked), _percent(answers, score["of"])]
        lines.append(f"| {score['category']} | {task} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else ""
