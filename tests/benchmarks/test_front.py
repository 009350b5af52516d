"""What `benchmarks/front.py` makes of measurements: README's first table, in its place."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "front.py"


@pytest.fixture(scope="module")
def front() -> ModuleType:
    spec = importlib.util.spec_from_file_location("front", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(peer: str, method: str, speed: float, **closeness: Any) -> dict[str, Any]:
    return {"peer": peer, "method": method, "tokens_per_second": speed, "kl": None, "top1": None} | closeness


def first_token(peer: str, length: int, ms: float, ratio: float | None) -> dict[str, Any]:
    return {"peer": peer, "length": length, "ms": ms, "tokens_per_second": length / ms * 1e3, "ratio": ratio}


@pytest.fixture
def document() -> dict[str, Any]:
    return {
        "rows": [
            row("hasten", "plain", 100.4, kl=0.0049, top1=0.963),
            row("hasten", "suffix", 150.2, kl=0.0049, top1=0.963),
            row("llama.cpp", "prompt-lookup", 60.0),
            row("llama.cpp", "plain", 50.0),
        ],
        "ratios": [{"kind": "plain", "ratio": 2.01}, {"kind": "best", "ratio": 2.5}],
        "first_tokens": [
            first_token("hasten", 50, 20.0, 3.0),
            first_token("hasten", 4000, 2000.0, None),
            first_token("llama.cpp", 50, 60.0, None),
        ],
    }


def test_the_table(front: ModuleType, document: dict[str, Any]):
    assert front.table(document).splitlines() == [
        "| new tokens/s | plain | its best | first token of 50 | first token of 4,000 | KL | top-1 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| hasten | 100 | 150 (`suffix`) | 20 ms (2,500/s) | 2,000 ms (2,000/s) | 0.0049 | 96.3% |",
        "| llama.cpp | 50 | 60 (`prompt-lookup`) | 60 ms (833/s) | – | – | – |",
        "| hasten over llama.cpp | 2.01 | 2.50 | 3.00 | – |  |  |",
    ]
    assert front.best(document, "hasten")["method"] == "suffix"


def test_it_takes_the_place_of_the_one_before(front: ModuleType):
    page = f"above\n{front.BEGIN}\nold\n{front.END}\nbelow\n"
    once = front.placed(page, "new")
    assert once == f"above\n{front.BEGIN}\n\nnew\n\n{front.END}\nbelow\n"
    assert front.placed(once, "new") == once
    with pytest.raises(ValueError, match="does not have"):
        front.placed("nothing", "new")


def test_the_readme_has_the_place(front: ModuleType):
    assert front.placed(front.README.read_text(), "x")


def test_the_question_that_is_raced(front: ModuleType):
    lines = '{"category": "qa", "turns": ["Who?"]}\n{"category": "summarization", "turns": ["Sum up", "Again"]}\n'
    assert front.question(lines) == "Sum up"
