"""Tokens per second as bars: a panel per precision and batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from catalogue import HASTEN, PEERS
from matplotlib import pyplot

OURS, THEIRS, FAINT = "#2f6db5", "#8d95a3", "#c3c8d0"


def draw(document: dict[str, Any], file: Path) -> None:
    """Per peer a bar for plain decoding, and a mark for its best speculation; whiskers span the rounds."""
    rows = document["rows"]
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    names = [name for name in reversed(PEERS) if any(row["peer"] == name for row in rows)]
    size = (3.1 * len(precisions) + 1.2, (0.32 * len(names) + 0.9) * len(batches))
    figure, panels = pyplot.subplots(
        len(batches), len(precisions), figsize=size, squeeze=False, sharey=True, constrained_layout=True
    )
    for row, batch in enumerate(batches):
        for column, precision in enumerate(precisions):
            own = [entry for entry in rows if (entry["precision"], entry["batch"]) == (precision, batch)]
            _panel(panels[row][column], own, names)
            panels[row][column].set_title(f"{precision}, batch {batch}", fontsize=9)
    for panel in panels[-1]:
        panel.set_xlabel("new tokens per second (diamond: best speculation)", fontsize=8)
    figure.savefig(file)
    pyplot.close(figure)


def _panel(axes: Any, rows: list[dict[str, Any]], names: list[str]) -> None:
    for place, name in enumerate(names):
        ways = [row for row in rows if row["peer"] == name]
        colour = OURS if name == HASTEN else THEIRS
        for row in ways:
            if row["method"] == "plain":
                speed = row["tokens_per_second"]
                spread = [[max(speed - row["slowest"], 0)], [max(row["fastest"] - speed, 0)]]
                axes.barh(place, speed, color=colour, height=0.6, xerr=spread, error_kw={"ecolor": FAINT})
        speculative = [row for row in ways if row["method"] != "plain"]
        if speculative:
            best = max(speculative, key=lambda row: row["tokens_per_second"])
            axes.plot(best["tokens_per_second"], place, "D", color=colour, markeredgecolor="white", markersize=6)
            reach = max(row["fastest"] for row in ways)
            place_of_text = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
            axes.annotate(best["method"], (reach, place), **place_of_text)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.25)
