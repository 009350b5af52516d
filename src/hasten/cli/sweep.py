"""`hasten sweep`: what lossy decoding costs in accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.cli import options
from hasten.cli.groups import grouped
from hasten.cli.options import ForDecoding
from hasten.errors import UserError
from hasten.files import write_text

ORACLE = "oracle"
LISTS, TASKS = "parallelbench-words:copy,random", "tasks"
"""Suites of models that fill masked positions, and of others, if nothing else is asked for."""


@grouped
def sweep(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="A model; oracle is the ideal one, which needs no weights."),
    ] = ORACLE,
    methods: Annotated[
        str | None, typer.Option(help="Decoders, separated by commas (default: all that fit the model).")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help=f"As of bench (default: {LISTS}, which are all that the ideal model knows; {TASKS} if the model "
            "predicts the next token)."
        ),
    ] = None,
    per_task: Annotated[int | None, typer.Option(help="Held-out prompts of each task or kind.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="New tokens at most (default: what the suite's answers need).")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy; the theory is of 1.")] = 1.0,
    seed: Annotated[int, typer.Option(help="When sampling.")] = 1,
    loading: ForDecoding = ForDecoding(),
    report: Annotated[Path | None, typer.Option(help="Write an HTML page with curves and tables here.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the curves into this SVG file.")] = None,
    json: options.Json = False,
) -> None:
    """Accuracy against speed: each lossy decoder of a model with its knob turned, as a curve.

    Decoders of diffusion models go by tokens per step, those of other models by their speed-up. Beside ParallelBench's
    list operations on single-token words stands what an ideal model reaches that fills so many positions a step in
    random order, sampling at temperature 1.
    """
    if per_task is not None and per_task < 1:
        raise UserError("per-task must be at least 1")
    from hasten.bench import plots
    from hasten.bench.report import write_sweep

    for target in (report, picture):
        if target is not None:
            plots.check_target(target)
    llm = None
    if model != ORACLE:
        llm = loading.load(model)

    from hasten.bench.ideal import ideal_points
    from hasten.bench.suite import load_suite
    from hasten.bench.sweep import sweep as measure
    from hasten.engine import SamplingParams
    from hasten.engine.specification import split_methods

    if suite is None:
        suite = TASKS if llm is not None and llm.model.config.diffusion is None else LISTS
    prompts = load_suite(suite, per_task, None if llm is None else llm.tokenizer)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    names = None if methods is None else split_methods(methods)
    with options.progress("decoding", len(prompts), quiet=json) as advance:
        measured = measure(llm, names, prompts, params, advance)
    single = llm is None or suite.startswith("parallelbench-words")
    document = {
        "model": model,
        "suite": suite,
        "command": options.command_line(),
        "temperature": temperature,
        **measured,
        "ideal": ideal_points(prompts) if single and temperature == 1 else [],
    }
    if report is not None:
        write_sweep(document, report)
    if picture is not None:
        write_text(picture, plots.tradeoffs(document["rows"], document["ideal"]))
    if json:
        options.emit(document)
    else:
        _print(document)


def _print(document: dict[str, Any]) -> None:
    """A block per category, a line per setting."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("decoder")
    # What a setting costs: of a diffusion model in rows, of another one in time.
    timed = any(row["speedup"] is not None for row in document["rows"])
    for head in ("tokens\n/step", "right", "95 %", "speed-\nup" if timed else "rows\n/token", "agrees"):
        table.add_column(head, justify="right")
    for category in dict.fromkeys(row["category"] for row in document["rows"]):
        table.add_row(category, style="bold")
        for point in document["ideal"]:
            if point["category"] == category:
                cells = (f"{point['tokens_per_step']:.2f}", f"{point['accuracy']:.0%}")
                table.add_row(f"  theory, {point['per_step']} a step", *cells, style="dim")
        for row in document["rows"]:
            if row["category"] == category:
                table.add_row(f"  {row['method']}", *_cells(row, timed))
    console.print(table)
    for entry in document["skipped"]:
        console.print(f"skipped {entry['method']}: {entry['reason']}", style="dim")


def _cells(row: dict[str, Any], timed: bool) -> list[str]:
    cost = {"speedup": "{:.2f}"} if timed else {"rows_per_token": "{:.0f}"}
    patterns = {"tokens_per_step": "{:.2f}", "accuracy": "{:.0%}", **cost, "agreement": "{:.0%}"}
    cells = ["-" if row[key] is None else pattern.format(row[key]) for key, pattern in patterns.items()]
    interval = row["accuracy_interval"]
    cells.insert(2, "-" if interval is None else "{:.0%}-{:.0%}".format(*interval))
    return cells
