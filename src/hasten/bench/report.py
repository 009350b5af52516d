"""The HTML reports of `hasten bench` and `hasten sweep`: one file each, nothing fetched from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hasten.bench import plots
from hasten.bench.compare import OVERALL
from hasten.files import write_text

CSS = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #23262d; background: #f5f6f8; margin: 0; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; }
h2 { font-size: 1.12rem; margin: 0 0 .3rem; }
p { margin: .3rem 0 .8rem; max-width: 48rem; }
section { background: #fff; border: 1px solid #e3e6eb; border-radius: 10px; padding: 1.2rem 1.4rem; margin: 1.2rem 0; }
.note { color: #5b6270; font-size: .92rem; }
.scroll { overflow-x: auto; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
table { border-collapse: collapse; font-size: .82rem; width: 100%; }
th, td { padding: .34rem .42rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eceef2; }
th { color: #5b6270; font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child, .words { text-align: left; }
.gain { color: #1c7a52; font-weight: 600; } .loss { color: #b23b3b; }
code { background: #eef0f4; border-radius: 4px; padding: .1rem .35rem; font-size: .88em; overflow-wrap: anywhere; }
"""

Row = Mapping[str, Any]
Cell = Callable[[Row], str]


def write_report(document: Mapping[str, Any], path: Path) -> None:
    """Write the page.

    Raises:
        UserError: matplotlib is missing; the file cannot be written.
    """
    write_text(path, render(document))


def write_sweep(document: Mapping[str, Any], path: Path) -> None:
    """Write the page of a document of `hasten sweep`.

    Raises:
        UserError: matplotlib is missing; the file cannot be written.
    """
    write_text(path, render_sweep(document))


def render(document: Mapping[str, Any]) -> str:
    """The page of a document of `hasten bench`.

    Raises:
        UserError: matplotlib is missing.
    """
    plots.require()
    rows: Sequence[Row] = document["rows"]
    overall = [row for row in rows if row["category"] == OVERALL]
    fast = [row for row in rows if row["method"] != "plain"]
    best = [row for row in overall if row["method"] != "plain"]
    body = [
        "<header><h1>hasten bench</h1>",
        f"<p>{_headline(best)}</p></header>",
        _section("How it was measured", "", _method_text(document, overall)),
    ]
    if fast:
        body += [
            _section(
                "Speed-up by category",
                "Plain seconds over the method's, prompt included. Left of 1 the method does not pay here.",
                plots.speedups(fast, OVERALL),
            ),
        ]
    if any(row["proposed_per_step"] for row in best):
        body.append(
            _section(
                "Accepted tokens per step",
                "How many draft tokens a verification takes over. Every step gives one more, the model's own.",
                plots.histograms(best),
            )
        )
    body.append(
        _section(
            "Where the time goes",
            "Prompt: until the first token. Then drafting, the forward pass, choosing and keeping tokens, the rest.",
            plots.time_split(overall),
        )
    )
    if document["verify_cost"] is not None:
        body.append(
            _section(
                "What further rows cost: v(n)",
                "A forward pass of n rows over one of a single row, on this machine. A draft pays if it earns more.",
                plots.verify_cost(document["verify_cost"], best),
            )
        )
    if fast and document["verify_cost"] is not None:
        body.append(
            _section(
                "Predicted and measured",
                "Predicted from tokens per step, drafting time and v(n) alone; both without the prompt. The band is "
                "10&nbsp;%. Large dots are the whole suite, small ones its categories.",
                plots.predictions(fast, OVERALL),
            )
        )
    body += [
        _section("Whole suite", "", _table(overall, OVERALL_COLUMNS)),
        _section("By category", "", _table([row for row in rows if row["category"] != OVERALL], CATEGORY_COLUMNS)),
    ]
    return _page(f"hasten bench: {document['suite']} on {Path(document['model']).name}", body)


def render_sweep(document: Mapping[str, Any]) -> str:
    """The page of a document of `hasten sweep`.

    Raises:
        UserError: matplotlib is missing.
    """
    plots.require()
    rows: Sequence[Row] = document["rows"]
    overall = [row for row in rows if row["category"] == OVERALL]
    theory = (
        " Grey: an ideal model that fills so many positions a step in random order, sampling at temperature 1. "
        "A decoder that chooses its positions well can be above it."
    )
    body = [
        "<header><h1>hasten sweep</h1>",
        "<p>Accuracy against speed: each decoder with its knob turned.</p></header>",
        _section(
            "How it was measured",
            "",
            f"<p>Model: <code>{html.escape(document['model'])}</code>. "
            f"Suite: <code>{html.escape(document['suite'])}</code>, {overall[0]['prompts']} prompts, "
            f"temperature {document['temperature']:g}.</p>"
            f"<p><code>{html.escape(document['command'])}</code></p>",
        ),
        _section(
            "Accuracy by speed",
            "A dot is a value of the decoder's knob." + (theory if document["ideal"] else ""),
            plots.tradeoffs(rows, document["ideal"]),
        ),
        _section("Whole suite", "", _table(overall, SWEEP_COLUMNS)),
        _section("By category", "", _table([row for row in rows if row["category"] != OVERALL], SWEEP_COLUMNS)),
    ]
    return _page(f"hasten sweep: {document['suite']} on {Path(document['model']).name}", body)


def _page(title: str, body: Sequence[str]) -> str:
    title = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def _headline(rows: Sequence[Row]) -> str:
    """The result in one sentence or two."""
    if not rows:
        return "Plain decoding alone."
    best = max(rows, key=lambda row: row["speedup"])
    name = f"<b>{html.escape(best['method'])}</b>"
    if best["speedup"] > 1:
        first = f"Fastest on the whole suite: {name}, {best['speedup']:.2f} times plain decoding."
    else:
        first = f"Nothing beats plain decoding on the whole suite here; {name} comes nearest ({best['speedup']:.2f})."
    different = [row["method"] for row in rows if row["identical"] < row["prompts"]]
    if different:
        names = ", ".join(map(html.escape, different))
        return f"{first} Other tokens than plain decoding's came from: {names} (see the tables)."
    return f"{first} Every method gave plain decoding's tokens on every prompt."


def _method_text(document: Mapping[str, Any], overall: Sequence[Row]) -> str:
    machine = {key: html.escape(str(value)) for key, value in document["machine"].items()}
    command = html.escape(document.get("command", "hasten bench"))
    threads = "1 thread" if machine["threads"] == "1" else f"{machine['threads']} threads"
    return (
        f"<p>Machine: {machine['processor']}, device {machine['device']}, {threads}, "
        f"PyTorch {machine['torch']}, backend {machine['backend']}, {machine['dtype']}. "
        f"Model: <code>{html.escape(document['model'])}</code>. Suite: <code>{html.escape(document['suite'])}</code>, "
        f"{overall[0]['prompts']} runs per method, one request at a time.</p>"
        "<p>All methods decode each prompt in turns, step by step, each on its own clock, beside plain decoding: what "
        "else the machine does falls on all alike. Speed-up is plain seconds over the method's, the median over "
        f"prompts.</p><p><code>{command}</code></p>"
    )


def _section(title: str, note: str, content: str) -> str:
    words = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{words}{content}</section>"


def _text(key: str) -> Cell:
    return lambda row: html.escape(str(row[key]))


def _number(key: str, pattern: str = "{:.2f}", factor: float = 1.0) -> Cell:
    return lambda row: "-" if row[key] is None else pattern.format(row[key] * factor)


def _gain(key: str) -> Cell:
    """A speed-up, coloured."""

    def cell(row: Row) -> str:
        if row[key] is None or row["method"] == "plain":
            return _number(key)(row)
        return f'<span class="{"gain" if row[key] > 1 else "loss"}">{row[key]:.2f}</span>'

    return cell


def _accepted(row: Row) -> str:
    if not row["proposed_per_step"]:
        return "-"
    return f"{row['accepted_per_step']:.2f} of {row['proposed_per_step']:.2f}"


def _share(key: str) -> Cell:
    return _number(key, "{:.0f} %", 100)


def _interval(key: str) -> Cell:
    return lambda row: "-" if row[key] is None else "{:.0f} to {:.0f} %".format(*(100 * end for end in row[key]))


OVERALL_COLUMNS: dict[str, Cell] = {
    "method": _text("method"),
    "speed-up": _gain("speedup"),
    "of mean rates": _number("speedup_of_rates"),
    "of decoding": _number("decode_speedup"),
    "predicted": _number("predicted_speedup"),
    "tokens/s": _number("tokens_per_second", "{:.0f}"),
    "tokens per step": _number("tokens_per_step"),
    "accepted of proposed, per step": _accepted,
    "drafting, µs per step": _number("draft_us_per_step", "{:.0f}"),
    "of a plain step": _share("draft_overhead"),
    "memory, MB": _number("memory_bytes", "{:.2f}", 1e-6),
    "rows per token": _number("rows_per_token"),
    "right": _share("accuracy"),
    "same tokens": _share("agreement"),
    "identical": lambda row: f"{row['identical']} of {row['prompts']}",
}

CATEGORY_COLUMNS: dict[str, Cell] = {
    "method": _text("method"),
    "category": _text("category"),
    "speed-up": _gain("speedup"),
    "of decoding": _number("decode_speedup"),
    "predicted": _number("predicted_speedup"),
    "tokens/s": _number("tokens_per_second", "{:.0f}"),
    "tokens per step": _number("tokens_per_step"),
    "accepted of proposed": _share("acceptance"),
    "right": _share("accuracy"),
    "identical": lambda row: f"{row['identical']} of {row['prompts']}",
}


SWEEP_COLUMNS: dict[str, Cell] = {
    "method": _text("method"),
    "category": _text("category"),
    "tokens per step": _number("tokens_per_step"),
    "right": _share("accuracy"),
    "95 %": _interval("accuracy_interval"),
    "rows per token": _number("rows_per_token"),
    "speed-up": _gain("speedup"),
    "same tokens": _share("agreement"),
}


def _table(rows: Sequence[Row], columns: Mapping[str, Cell]) -> str:
    head = "".join(f"<th{_words(name)}>{name}</th>" for name in columns)
    lines = ("".join(f"<td{_words(name)}>{cell(row)}</td>" for name, cell in columns.items()) for row in rows)
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _words(name: str) -> str:
    return ' class="words"' if name == "category" else ""
