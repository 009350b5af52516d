"""Results and the catalogue on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from catalogue import HASTEN, PEERS, Peer
from rich.console import Console
from rich.table import Table

COLUMNS = {
    "tokens/s": ("tokens_per_second", "{:,.0f}", 8),
    "KL": ("kl", "{:.4f}", 6),
    "top-1": ("top1", "{:.1%}", 6),
    "slowest": ("slowest", "{:,.0f}", 7),
    "fastest": ("fastest", "{:,.0f}", 7),
    "decoding": ("decode_tokens_per_second", "{:,.0f}", 8),
    "loop": ("overhead", "{:.0%}", 4),
    "prefix": ("prefix_share", "{:.0%}", 6),
    "same": ("same_share", "{:.0%}", 4),
    "gap": ("gap", "{:.2f}", 4),
}
"""Heads of the table, with the rows' keys, how they are written, and the least width."""
WIDTH = 120
LEGEND = (
    "tokens/s: median of the rounds, prompts included. decoding: without the prompts, where the peer tells. "
    "loop: share of time in the worker's own loop. prefix, same: agreement with transformers in float32, up to the "
    "first difference and position by position. gap: logits between the reference's two likeliest tokens where an "
    "answer first differs, the widest. KL, top-1: predictions on the prompts' own tokens beside the reference's, mean "
    "KL in nats and share of the same likeliest token; - where the peer does not tell."
)


def results(document: dict[str, Any]) -> None:
    """First tokens per precision, a block per precision and batch size with its ratios, what could not be measured."""
    # In a pipe or a file there is room for all columns.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    for precision in dict.fromkeys(entry["precision"] for entry in document["first_tokens"]):
        console.print(f"[bold]{precision}, until the first token of a prompt read alone")
        console.print(_first_tokens([entry for entry in document["first_tokens"] if entry["precision"] == precision]))
        console.print()
    for precision, batch in dict.fromkeys((row["precision"], row["batch"]) for row in document["rows"]):
        console.print(f"[bold]{precision}, batch {batch}")
        console.print(
            _block([row for row in document["rows"] if (row["precision"], row["batch"]) == (precision, batch)])
        )
        for ratio in document["ratios"]:
            if (ratio["precision"], ratio["batch"]) == (precision, batch):
                kind = "both plain" if ratio["kind"] == "plain" else "best of all"
                versus = f"hasten {ratio['hasten']} / {ratio['peer']} {ratio['method']}"
                console.print(f"{kind}: {versus}: [bold]{ratio['ratio']:.2f}")
        console.print()
    for line in _unavailable(document["unavailable"]):
        console.print(line, markup=False, style="yellow", soft_wrap=True)
    console.print(LEGEND, style="dim")


def _first_tokens(entries: Sequence[dict[str, Any]]) -> Table:
    """Per length the milliseconds, the prompt's tokens per second, and the best peer's time over hasten's."""
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("peer", min_width=12, no_wrap=True)
    lengths = sorted({entry["length"] for entry in entries})
    for length in lengths:
        for head in (f"{length:,}: ms", "tokens/s", "ratio"):
            table.add_column(head, justify="right", no_wrap=True)
    for peer in dict.fromkeys(entry["peer"] for entry in entries):
        cells = []
        for length in lengths:
            own = [entry for entry in entries if (entry["peer"], entry["length"]) == (peer, length)]
            for key, pattern in (("ms", "{:,.1f}"), ("tokens_per_second", "{:,.0f}"), ("ratio", "{:.2f}")):
                cells.append(pattern.format(own[0][key]) if own and own[0][key] is not None else "-")
        table.add_row(peer, *cells, style="bold" if peer == HASTEN else "")
    return table


def _block(rows: Sequence[dict[str, Any]]) -> Table:
    """The fastest first."""
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("peer", min_width=12, no_wrap=True)
    table.add_column("method", min_width=15, no_wrap=True)
    for head, (_, _, width) in COLUMNS.items():
        table.add_column(head, min_width=width, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: -float(row["tokens_per_second"])):
        cells = ["-" if row[key] is None else pattern.format(row[key]) for key, pattern, _ in COLUMNS.values()]
        table.add_row(row["peer"], row["method"], *cells, style="bold" if row["peer"] == HASTEN else "")
    return table


def _unavailable(entries: Sequence[dict[str, Any]]) -> list[str]:
    """A line per peer and reason."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault((entry["peer"], entry["reason"]), []).append(entry)
    lines = []
    for (peer, reason), own in groups.items():
        what = "; ".join(", ".join(dict.fromkeys(str(entry[key]) for entry in own)) for key in ("precision", "method"))
        batches = ", ".join(dict.fromkeys(str(entry["batch"]) for entry in own))
        lines.append(f"{peer} ({what}; batch {batches}) not available: {reason}")
    return lines


def listing(version: Callable[[Peer], str | None]) -> list[dict[str, Any]]:
    """The catalogue; `version` tells a peer's, if it is installed."""
    keys = ("precisions", "gguf", "methods", "batching", "lacks")
    return [
        {"peer": peer.name, "version": version(peer), **{key: getattr(peer, key) for key in keys}}
        for peer in PEERS.values()
    ]


def peers(rows: Sequence[dict[str, Any]]) -> None:
    """What `--list` shows: a paragraph per peer."""
    console = Console(highlight=False)
    for row in rows:
        console.print(f"[bold]{row['peer']}[/bold] {row['version'] or '(not installed)'}")
        console.print(f"  {', '.join(row['precisions'])}; batches: {row['batching']}")
        console.print(f"  GGUF files: {', '.join(row['gguf']) or 'none'}")
        if row["methods"]:
            console.print(f"  speculation: {', '.join(row['methods'])}")
        if row["lacks"]:
            console.print(f"  lacks: {row['lacks']}")
