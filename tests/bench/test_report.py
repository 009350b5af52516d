"""The HTML report: whole, self-contained, and true to the document it shows."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from hasten import UserError
from hasten.bench import plots, report

MACHINE = {
    "device": "cpu", "processor": "x86_64 <fast>", "threads": 2, "torch": "2", "backend": "torch", "dtype": "float32",
    "model": "/models/tiny",
}  # fmt: skip


def row(method: str, category: str, speedup: float = 1.0, **other: Any) -> dict[str, Any]:
    drafts = method != "plain"
    return {
        "method": method,
        "category": category,
        "prompts": 4,
        "tokens_per_step": 1 + drafts * 0.75,
        "tokens_per_second": 400 * speedup,
        "speedup": speedup,
        "speedup_of_rates": speedup,
        "decode_speedup": speedup,
        "predicted_speedup": speedup * 1.02,
        "accuracy": 0.5,
        "acceptance": 0.25 if drafts else None,
        "accepted_per_step": 0.75 if drafts else 0.0,
        "accepted_histogram": [30, 6, 0, 4] if drafts else [70],
        "proposed_per_step": 3.0 if drafts else 0.0,
        "draft_us_per_step": 40.0 * drafts,
        "draft_overhead": 0.02 * drafts,
        "draft_share": 0.02 * drafts,
        "time_split": {"prompt": 0.01, "draft": 0.002 * drafts, "forward": 0.1, "verify": 0.01, "other": 0.001},
        "memory_bytes": 2_500_000 * drafts,
        "identical": 4,
        "rows_per_token": 1.0,
        "agreement": 1.0,
    } | other


def document(*methods: str, **other: Any) -> dict[str, Any]:
    rows = [
        row(method, category) if method == "plain" else row(method, category, **{"speedup": speedup, **other})
        for method in ("plain", *methods)
        for category, speedup in (("lists", 1.84), ("prose", 0.91), ("overall", 1.37))
    ]
    costs = {"1": 1.0, "4": 1.2, "16": 1.5}
    return {
        "model": "tiny", "suite": "spec", "command": "hasten bench --suite 'a & b'", "machine": MACHINE,
        "verify_cost": costs, "rows": rows,
    }  # fmt: skip


@pytest.fixture(scope="module")
def page() -> str:
    return report.render(document("ngram", "suffix:depth=8"))


def test_the_page_is_whole_and_fetches_nothing(page: str):
    for heading in (
        "How it was measured", "Speed-up by category", "Accepted tokens per step", "Where the time goes", "v(n)",
        "Predicted and measured", "Whole suite", "By category",
    ):  # fmt: skip
        assert heading in page
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(svgs) == 5
    identifiers: list[str] = []
    for svg in svgs:
        root = ElementTree.fromstring(svg)
        identifiers += {element.attrib["id"] for element in root.iter() if "id" in element.attrib}
        assert not [element for element in root.iter() if element.tag.endswith(("metadata", "script", "image"))]
    outside = re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)
    assert not re.search(r"https?:|<link|<script|@import|url\((?!#)|src=", outside)
    assert len(set(identifiers)) == len(identifiers), "the figures' identifiers do not clash"


def test_the_page_says_what_the_document_says(page: str):
    assert "<b>ngram</b>, 1.37 times plain decoding" in page and "plain decoding's tokens on every prompt" in page
    assert '<span class="gain">1.84</span>' in page and '<span class="loss">0.91</span>' in page
    assert "hasten bench --suite &#x27;a &amp; b&#x27;" in page and "x86_64 &lt;fast&gt;" in page
    assert "4 of 4" in page and "2.50" in page and "50 %" in page


def test_it_hides_nothing():
    assert "Nothing beats plain decoding" in report.render(document("ngram", speedup=0.8))
    assert "Other tokens than plain decoding's came from: ngram" in report.render(document("ngram", identical=3))


def test_plain_alone_and_drafters_that_stay_silent():
    assert "Plain decoding alone" in report.render(document())
    silent = {"acceptance": None, "accepted_histogram": [], "accepted_per_step": None, "proposed_per_step": None}
    none = silent | {"decode_speedup": None, "predicted_speedup": None, "draft_overhead": None}
    assert report.render(document("ngram", **none)).count("<svg") == 4


def test_without_a_curve_there_is_no_prediction():
    page = report.render(document("threshold") | {"verify_cost": None})
    assert page.count("<svg") == 3 and "v(n)" not in page and "Predicted and measured" not in page


def test_many_methods():
    page = report.render(document(*(f"ngram:length={length}" for length in range(1, 12))))
    assert page.count("<svg") == 5 and "ngram:length=11" in page


def test_the_same_document_gives_the_same_page(page: str):
    assert report.render(document("ngram", "suffix:depth=8")) == page


def test_what_cannot_be_written_is_said_before_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="folder that exists"):
        plots.check_target(tmp_path / "none" / "report.html")
    with pytest.raises(UserError, match="folder that exists"):
        plots.check_target(tmp_path)
    plots.check_target(tmp_path / "report.html")
    with pytest.raises(UserError, match="cannot write"):
        report.write_report(document(), tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"hasten\[plots\]"):
        plots.require()
