"""README's first table and its picture: a real model on Spec-Bench, beside llama.cpp on the very same GGUF file.

    python benchmarks/front.py --prompts question.jsonl [--out FOLDER]

One call measures and writes both: `benchmarks/peers`, plain and with each one's own speculation, on two threads; then
`hasten race` on one of the questions. Ctrl-C loses nothing that was measured; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README, PICTURE = ROOT / "README.md", ROOT / "docs" / "race.svg"
BEGIN, END = "<!-- benchmarks/front.py writes this -->", "<!-- until here -->"
OURS, THEIRS = "hasten", "llama.cpp"
QUESTION = "summarization"
"""The first question of this category is raced."""


def main() -> int:
    """The exit status of the first command that fails, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="question.jsonl of Spec-Bench")
    parser.add_argument("--model", default="smollm2", help="GGUF file, or the name of one that was pulled")
    parser.add_argument("--prompt-count", type=int, default=18)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("front"), help="folder of what was measured")
    options = parser.parse_args()
    measured = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "peers"), "--checkpoint", options.model, "--speculation"),
            *("--peers", f"{OURS},{THEIRS}", "--batches", "1", "--prompts", str(options.prompts)),
            *("--prompt-count", str(options.prompt_count), "--max-tokens", str(options.max_tokens)),
            *("--rounds", str(options.rounds), "--out", str(options.out)),
        ]
    )
    if measured.returncode:
        return measured.returncode
    document = json.loads((options.out / "results.json").read_text())
    README.write_text(placed(README.read_text(), table(document)))
    raced = subprocess.run(
        [
            *(sys.executable, "-m", "hasten", "race", "-", "--model", options.model, "--chat", "--threads", "2"),
            *("--method", best(document, OURS)["method"], "--max-tokens", "192", "--svg", str(PICTURE)),
        ],
        input=question(options.prompts.read_text()),
        text=True,
    )
    return raced.returncode


def best(document: dict[str, Any], peer: str, method: str | None = None) -> dict[str, Any]:
    """A peer's fastest row of all, or the one of a method."""
    own = [row for row in document["rows"] if row["peer"] == peer and method in (None, row["method"])]
    return max(own, key=lambda row: float(row["tokens_per_second"]))


def table(document: dict[str, Any]) -> str:
    """Both engines, a line each, and what hasten is over llama.cpp; ratios are those of rounds that both have."""
    entries = document["first_tokens"]
    lengths = sorted({entry["length"] for entry in entries})
    heads = ["new tokens/s", "plain", "its best", *(f"first token of {length:,}" for length in lengths), "KL", "top-1"]
    lines = [heads, ["---"] * len(heads)]
    for peer in (OURS, THEIRS):
        plain, fastest = best(document, peer, "plain"), best(document, peer)
        read = {entry["length"]: entry for entry in entries if entry["peer"] == peer}
        lines.append(
            [
                peer,
                f"{plain['tokens_per_second']:,.0f}",
                f"{fastest['tokens_per_second']:,.0f} (`{fastest['method']}`)",
                *(_first_token(read.get(length)) for length in lengths),
                "–" if plain["kl"] is None else f"{plain['kl']:.4f}",
                "–" if plain["top1"] is None else f"{plain['top1']:.1%}",
            ]
        )
    ratios = {ratio["kind"]: ratio["ratio"] for ratio in document["ratios"]}
    sooner = {entry["length"]: entry["ratio"] for entry in entries if entry["peer"] == OURS}
    over = [ratios["plain"], ratios["best"], *(sooner.get(length) for length in lengths)]
    lines.append([f"{OURS} over {THEIRS}", *("–" if each is None else f"{each:.2f}" for each in over), "", ""])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _first_token(entry: dict[str, Any] | None) -> str:
    """Milliseconds, and the prompt's tokens per second."""
    return "–" if entry is None else f"{entry['ms']:,.0f} ms ({entry['tokens_per_second']:,.0f}/s)"


def placed(page: str, text: str) -> str:
    """A page with a text between the marks that it has."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"the page does not have {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def question(lines: str, category: str = QUESTION) -> str:
    """The first turn of a category's first question."""
    entries: Sequence[dict[str, Any]] = [json.loads(line) for line in lines.splitlines() if line]
    return str(next(entry["turns"][0] for entry in entries if entry["category"] == category))


if __name__ == "__main__":
    sys.exit(main())
