"""The plots of a report, by matplotlib, each as one SVG element."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import UserError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

COLOURS = (
    "#2f6db5", "#dd7a2b", "#2f9d72", "#b0508e", "#8c6f3d", "#58b3cc", "#c2484d", "#6c6f7a", "#9a8fd1", "#a4b53a",
)  # fmt: skip
"""A method's colour, in the order of their rows."""
PARTS = {"prompt": "#c3c8d0", "draft": "#dd7a2b", "forward": "#2f6db5", "verify": "#2f9d72", "other": "#8d95a3"}
INK, FAINT = "#3a3f4a", "#e3e6eb"
WIDTH = 8.6
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    # A category may have dollar signs.
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.edgecolor": "#b8bec8",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def require() -> None:
    """Fail now rather than after a long measurement.

    Raises:
        UserError: matplotlib (or scipy, for fits) is not installed.
    """
    try:
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise UserError(f"a report needs {error.name}: pip install 'hasten[plots]'") from None


def check_target(path: Path) -> None:
    """Fail now rather than after a long measurement.

    Raises:
        UserError: matplotlib is missing, or there is no folder to write the file to.
    """
    require()
    if not path.parent.is_dir() or path.is_dir():
        raise UserError(f"cannot write to {path}: give a file in a folder that exists")


def speedups(rows: Sequence[Row], overall: str) -> str:
    """Speed-up by category, a dot per method; `overall` comes last."""
    names = _methods(rows)
    found = dict.fromkeys(row["category"] for row in rows)
    categories = [*(category for category in found if category != overall), overall]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        reach = 0.5 * (len(names) - 1) / max(len(names), 4)
        for number, name in enumerate(names):
            own = {row["category"]: row["speedup"] for row in rows if row["method"] == name}
            shift = reach * (2 * number / (len(names) - 1) - 1) if len(names) > 1 else 0.0
            heights = [place + 0.55 * shift for place, category in enumerate(categories) if category in own]
            values = [own[category] for category in categories if category in own]
            axes.hlines(heights, 1, values, color=_colour(number), linewidth=1.6, alpha=0.45)
            axes.plot(values, heights, "o", color=_colour(number), markersize=6, label=name)
        for place in range(1, len(categories)):
            axes.axhline(place - 0.5, color=FAINT, linewidth=0.8)
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_yticks(range(len(categories)), categories)
        axes.set_ylim(len(categories) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlim(left=0)
        axes.set_xlabel("times as fast as plain decoding (median over prompts)")
        _legend(figure, len(names))

    height = 0.9 + len(categories) * max(0.34, 0.13 * len(names)) + 0.25 * ((len(names) + 3) // 4)
    return _svg("speedups", height, draw)


def histograms(rows: Sequence[Row]) -> str:
    """Accepted draft tokens per step: the share of steps by count, a panel per method."""
    drafting = [row for row in rows if row["proposed_per_step"]]
    across = min(3, max(len(drafting), 1))
    down = (len(drafting) + across - 1) // across or 1

    def draw(figure: Figure) -> None:
        panels = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
        for axes in panels[len(drafting) :]:
            axes.set_visible(False)
        for axes, row in zip(panels, drafting, strict=False):
            counts = row["accepted_histogram"]
            shares = [count / sum(counts) for count in counts]
            axes.bar(range(len(shares)), shares, color=_colour(_methods(rows).index(row["method"])), width=0.8)
            axes.set_title(row["method"], fontsize=9.5, loc="left")
            axes.yaxis.set_major_formatter(_percent)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlim(-0.6, max(len(shares) - 0.4, 4.6))
            axes.grid(axis="x", visible=False)
        figure.supxlabel("accepted draft tokens in a step", fontsize=9.5)
        figure.supylabel("share of steps", fontsize=9.5)

    return _svg("histograms", 0.5 + 1.75 * down, draw)


def time_split(rows: Sequence[Row]) -> str:
    """Where the time of a token goes: stacked bars, one per method, plain decoding first."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        tokens = [row["tokens_per_second"] * sum(row["time_split"].values()) for row in rows]
        left = [0.0] * len(rows)
        for part, colour in PARTS.items():
            widths = [row["time_split"][part] / count * 1e3 for row, count in zip(rows, tokens, strict=True)]
            axes.barh(range(len(rows)), widths, left=left, color=colour, height=0.62, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("milliseconds per token")
        _legend(figure, len(PARTS), columns=len(PARTS))

    return _svg("time", 1.0 + 0.36 * len(rows), draw)


def verify_cost(costs: Mapping[str, float], rows: Sequence[Row]) -> str:
    """v(n), and where on it each method's average step lies."""
    points = [(int(count), cost) for count, cost in costs.items()]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(*zip(*points, strict=True), "o-", color="#8d95a3", markersize=3.5, linewidth=1.6)
        for number, name in enumerate(_methods(rows)):
            row = next(row for row in rows if row["method"] == name)
            at = 1 + (row["proposed_per_step"] or 0.0)
            axes.plot(at, _on(points, at), "o", color=_colour(number), markersize=8, label=name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("rows of a step: the draft's nodes and one (dots: each method's average)")
        axes.set_ylabel("cost over a step of one row")
        _legend(figure, len(_methods(rows)))

    return _svg("verify-cost", 3.4, draw)


def predictions(rows: Sequence[Row], overall: str) -> str:
    """Predicted against measured speed-up of decoding: a dot per method and category, overall ones larger."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        top = 1.0
        for number, name in enumerate(_methods(rows)):
            shown = [row for row in rows if row["method"] == name and row["decode_speedup"] is not None]
            predicted = [row["predicted_speedup"] for row in shown]
            measured = [row["decode_speedup"] for row in shown]
            sizes = [70 if row["category"] == overall else 18 for row in shown]
            axes.scatter(predicted, measured, s=sizes, color=_colour(number), alpha=0.8, linewidths=0, label=name)
            top = max([top, *predicted, *measured])
        line = [0.0, top * 1.08]
        axes.plot(line, line, color=INK, linewidth=1)
        axes.fill_between(line, [0.9 * x for x in line], [1.1 * x for x in line], color=INK, alpha=0.07, linewidth=0)
        axes.set_xlim(*line)
        axes.set_ylim(*line)
        axes.set_aspect("equal")
        axes.set_xlabel("predicted speed-up of decoding")
        axes.set_ylabel("measured")
        _legend(figure, len(_methods(rows)), marker=35.0)

    return _svg("predictions", 4.6, draw)


def laws(document: Mapping[str, Any]) -> str:
    """Scylla's three axes: points with error bars, the fitted line, the largest point (held out) hollow."""
    panels = (
        ("data", "training tokens", "tokens_per_step", "law"),
        ("capacity", "parameters of the layers", "tokens_per_step", "law"),
        ("batch", "batch size", "speedup", "speedup_law"),
    )

    from matplotlib.ticker import NullLocator

    def draw(figure: Figure) -> None:
        for number, (axes, (axis, label, key, law)) in enumerate(zip(figure.subplots(1, 3), panels, strict=True)):
            points, fit = document[axis]["points"], document[axis][law]
            x, y = [point["x"] for point in points], [point[key] for point in points]
            line = fit["forms"]["log-linear"]
            axes.set_xscale("log")
            axes.plot(x, [line["a"] * math.log10(each) + line["b"] for each in x], color=FAINT, linewidth=2.5)
            axes.errorbar(x, y, [point.get("error", 0.0) for point in points], fmt="none", ecolor=_colour(number))
            axes.plot(x[:-1], y[:-1], "o", color=_colour(number))
            axes.plot(x[-1:], y[-1:], "o", color=_colour(number), markerfacecolor="white")
            axes.set_xticks(x, [_short(each) for each in x])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(label)
            axes.set_ylabel("speed-up" if key == "speedup" else "tokens per step")

    return _svg("laws", 3.0, draw)


def step_costs(document: Mapping[str, Any]) -> str:
    """The picture of `hasten doctor`: per precision a step against reading its weights, v(n), and a further row."""
    precisions = document["precisions"]

    def draw(figure: Figure) -> None:
        bars, curves, rows = figure.subplots(1, 3, width_ratios=(1.0, 1.1, 1.1))
        for place, (name, found) in enumerate(precisions.items()):
            bars.barh(place, found["step_ms"], color=_colour(place), height=0.6)
            bars.plot([found["roofline_ms"]] * 2, [place - 0.4, place + 0.4], color=INK, linewidth=1.6)
            cost = {int(count): value for count, value in found["verify_cost"].items()}
            curves.plot(list(cost), list(cost.values()), "o-", color=_colour(place), markersize=3.5, label=name)
            further = {count: (value - 1) / (count - 1) for count, value in cost.items() if count > 1}
            rows.plot(list(further), list(further.values()), "o-", color=_colour(place), markersize=3.5)
        bars.set_yticks(range(len(precisions)), list(precisions))
        bars.invert_yaxis()
        bars.grid(axis="y", visible=False)
        bars.set_xlabel(f"ms of a step of one row\n(mark: weights at {document['bandwidth_gbs']:.0f} GB/s)")
        curves.set_xlabel("rows of a step")
        curves.set_ylabel("its cost, over one row: v(n)")
        curves.set_ylim(bottom=0)
        rows.set_xlabel("rows of a step")
        rows.set_ylabel("steps that a further row costs")
        rows.set_ylim(bottom=0)
        handles, labels = curves.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))

    return _svg("step-costs", 3.1, draw)


def tradeoffs(rows: Sequence[Row], ideal: Sequence[Row] = ()) -> str:
    """The picture of `hasten sweep`: accuracy by tokens per step, a panel per category, a curve per decoder.

    Where every step gives one token, it is by speed-up. The theory is grey.
    What all decoders are told alike is left out of their names, and of the scale what no decoder comes near.
    """
    decoders = list(dict.fromkeys(row["decoder"] for row in rows))
    names = _apart(decoders)
    reached = [row["accuracy"] for row in (*rows, *ideal) if row["accuracy"] is not None]
    bottom = max(-0.04, math.floor(10 * min(reached, default=0) - 1) / 10)
    top = min(1.06, math.ceil(10 * max(reached, default=1) + 1) / 10)
    categories = list(dict.fromkeys(row["category"] for row in rows if row["accuracy"] is not None))
    if len(categories) == 2:
        categories.pop()  # the whole is the one category
    by = "speedup" if all(row["tokens_per_step"] <= 1 for row in rows) else "tokens_per_step"
    across = min(3, max(len(categories), 1))
    down = -(-len(categories) // across) or 1

    def draw(figure: Figure) -> None:
        panels = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
        for axes in panels[len(categories) :]:
            axes.set_visible(False)
        for axes, category in zip(panels, categories, strict=False):
            theory = [(each["tokens_per_step"], each["accuracy"]) for each in ideal if each["category"] == category]
            if theory:
                axes.plot(*zip(*theory, strict=True), "--", color="#8d95a3", linewidth=2.4, label="ideal, random order")
            for number, decoder in enumerate(decoders):
                own = [row for row in rows if row["decoder"] == decoder and row["category"] == category]
                x, y = [row[by] for row in own], [row["accuracy"] for row in own]
                axes.plot(x, y, "o-", color=_colour(number), markersize=4, linewidth=1.4, label=names[decoder])
            axes.set_title(category, fontsize=9.5, loc="left")
            axes.yaxis.set_major_formatter(_percent)
            axes.set_ylim(bottom, top)
        figure.supxlabel("speed-up" if by == "speedup" else "tokens per step", fontsize=9.5)
        figure.supylabel("right", fontsize=9.5)
        named: dict[str, Artist] = {}
        for axes in panels:
            handles, labels = axes.get_legend_handles_labels()
            named |= dict(zip(labels, handles, strict=True))
        figure.legend(named.values(), list(named), loc="outside upper left", ncols=min(len(named), 4) or 1)

    return _svg("tradeoffs", 0.8 + 2.4 * down + 0.25 * (len(decoders) // 4), draw)


def _apart(specifications: Sequence[str]) -> dict[str, str]:
    """Methods by what tells them apart: without the parameters that all but plain decoding share."""
    given = {spec: [item for item in spec.partition(":")[2].split(",") if item] for spec in specifications}
    shared = set.intersection(*[set(items) for spec, items in given.items() if spec != "plain"] or [set()])
    named = {
        spec: ":".join(filter(None, (spec.partition(":")[0], ",".join(item for item in items if item not in shared))))
        for spec, items in given.items()
    }
    return named if len(set(named.values())) == len(named) else {spec: spec for spec in specifications}


def _methods(rows: Sequence[Row]) -> list[str]:
    """All but plain decoding, in order."""
    return list(dict.fromkeys(row["method"] for row in rows if row["method"] != "plain"))


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _short(value: float) -> str:
    """A count in few characters: 0.1M, 16M, 8."""
    return f"{value:g}" if value < 10_000 else f"{value / 1e6:.1g}M" if value < 1e6 else f"{value / 1e6:g}M"


def _percent(value: float, place: int) -> str:
    return f"{100 * value:.0f} %"


def _on(points: Sequence[tuple[int, float]], at: float) -> float:
    """The curve's value between its points; its last one beyond them."""
    for (low, before), (high, after) in itertools.pairwise(points):
        if at <= high:
            return before + (at - low) / (high - low) * (after - before)
    return points[-1][1]


def _legend(figure: Figure, entries: int, columns: int = 4, marker: float | None = None) -> None:
    """Above the plot, where it hides nothing."""
    axes: Axes = figure.axes[0]
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside upper left", ncols=min(entries, columns) or 1)
    if marker is not None:
        for handle in legend.legend_handles:
            handle.set_sizes([marker])  # type: ignore[union-attr]


def _svg(name: str, height: float, draw: Callable[[Figure], None]) -> str:
    """One figure as an SVG element that needs nothing from elsewhere."""
    import matplotlib
    from matplotlib.figure import Figure

    # The salt makes the identifiers inside reproducible, and different from those of the page's other figures.
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height))
        draw(figure)
        paper = io.StringIO()
        figure.savefig(paper, format="svg", transparent=True, metadata={"Date": None})
    svg = paper.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1).strip()
