"""Spec-Bench's figures in the shape that papers quote: a line per method, two columns per category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hasten.bench.compare import OVERALL

HEADS = {
    "mt_bench": "multi-turn",
    "translation": "translation",
    "summarization": "summary",
    "qa": "QA",
    "math_reasoning": "math",
    "rag": "RAG",
    OVERALL: "overall",
}
"""Heads of the categories, in the order of the published tables."""


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lines of text: mean accepted tokens and speed-up by category, and how many texts are plain decoding's.

    Args:
        rows: of `bench`, on Spec-Bench or a part of it; categories without a row have no columns.
    """
    found = {(row["method"], row["category"]): row for row in rows}
    methods = dict.fromkeys(row["method"] for row in rows)
    heads = {name: head for name, head in HEADS.items() if any(row["category"] == name for row in rows)}
    lines = [["", *heads.values(), ""], ["method", *("MAT speed" for _ in heads), "identical"]]
    for method in methods:
        overall = found[method, OVERALL]
        same = f"{overall['identical']}/{overall['prompts']}"
        lines.append([method, *(_pair(found[method, name]) for name in heads), same])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_line(cells, widths) for cells in lines)


def _pair(row: Mapping[str, Any]) -> str:
    """Mean accepted tokens and speed-up; answers of one token have no steps to count the former by."""
    accepted = row["mean_accepted_tokens"]
    return f"{'-' if accepted is None else format(accepted, '.2f')} {row['speedup_of_rates']:.2f}x"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Cells side by side: the first one to the left of its column, the others to the right."""
    others = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
    return "  ".join([cells[0].ljust(widths[0]), *others]).rstrip()
