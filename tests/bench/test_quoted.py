"""The table that papers quote."""

from __future__ import annotations

from typing import Any

from hasten.bench.published import GROUPS
from hasten.bench.quoted import HEADS, table


def row(method: str, category: str, accepted: float | None, speedup: float) -> dict[str, Any]:
    figures = {"mean_accepted_tokens": accepted, "speedup_of_rates": speedup}
    return {"method": method, "category": category, "identical": 2, "prompts": 3} | figures


def test_a_line_per_method_and_two_columns_per_category():
    rows = [row("plain", name, 1.0, 1.0) for name in HEADS] + [row("ngram", name, 12.5, 2.25) for name in HEADS]
    rows[-1]["mean_accepted_tokens"] = None
    above, head, plain, ngram = table(rows).splitlines()
    assert above.split() == ["multi-turn", "translation", "summary", "QA", "math", "RAG", "overall"]
    assert head.split() == ["method", *["MAT", "speed"] * 7, "identical"]
    assert plain.split() == ["plain", *["1.00", "1.00x"] * 7, "2/3"]
    assert ngram.split() == ["ngram", *["12.50", "2.25x"] * 6, "-", "2.25x", "2/3"]
    assert len({len(line) for line in (head, plain, ngram)}) == 1
    assert tuple(HEADS)[:-1] == GROUPS


def test_a_part_of_the_suite_has_its_columns_only():
    text = table([row("plain", "qa", 1.0, 1.0), row("plain", "overall", 1.0, 1.0)])
    assert text.splitlines()[0].split() == ["QA", "overall"]
