"""`hasten bench`: methods side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.cli import options
from hasten.cli.groups import grouped
from hasten.cli.options import ForDecoding
from hasten.errors import UserError


@grouped
def bench(
    methods: Annotated[
        str | None,
        typer.Option(help="Methods, separated by commas (slug:key=value); by default one that fits the model."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="tasks, spec, redundant, agent, prose, a task or its category, parallelbench, parallelbench-n15 or "
            "parallelbench-words (and :PART,PART), spec-bench, humaneval, or a file of prompts (default: --prompts, or "
            "tasks)."
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts: your own, or that of suite spec-bench or humaneval.")
    ] = None,
    model: options.Model = "tiny",
    per_task: Annotated[int | None, typer.Option(help="Held-out prompts of each task or kind.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each category at most, evenly chosen.")] = None,
    rounds: Annotated[int, typer.Option(help="Times the suite is decoded.")] = 1,
    samples: Annotated[int, typer.Option(help="Answers to each prompt, when sampling.")] = 1,
    max_tokens: Annotated[
        int | None, typer.Option(help="New tokens at most (default: 256, or what the suite's answers need).")
    ] = None,
    temperature: Annotated[
        str, typer.Option(help="0 is greedy; 0,1 decodes the suite at both, one after the other.")
    ] = "0",
    seed: Annotated[int, typer.Option(help="When sampling.")] = 1,
    chat: options.Chat = False,
    loading: ForDecoding = ForDecoding(),
    report: Annotated[Path | None, typer.Option(help="Write an HTML page with plots here.")] = None,
    json: options.Json = False,
) -> None:
    """Compare methods with plain decoding on a suite, in turns within one run."""
    if min(count for count in (rounds, samples, per_task, limit) if count is not None) < 1:
        raise UserError("per-task, limit, rounds and samples must be at least 1")
    temperatures = _temperatures(temperature)
    if suite is None:
        suite, prompts = str(prompts or "tasks"), None
    if report is not None:
        from hasten.bench import plots
        from hasten.bench.report import write_report

        if len(temperatures) > 1:
            raise UserError("a report is of one temperature")
        plots.check_target(report)
    llm = loading.load(model)

    from hasten.bench.compare import bench as measure
    from hasten.bench.conversation import as_chat
    from hasten.bench.prompts import limited
    from hasten.bench.published import SPEC_BENCH
    from hasten.bench.quoted import table
    from hasten.bench.race import default_method
    from hasten.bench.suite import load_suite
    from hasten.engine import SamplingParams
    from hasten.engine.specification import split_methods

    names = [default_method(llm.model.config)] if methods is None else split_methods(methods)
    asked = load_suite(suite, per_task, llm.tokenizer, prompts)
    if limit is not None:
        asked = limited(asked, limit)
    if chat:
        asked = as_chat(llm, asked)
    params = [SamplingParams(max_tokens=max_tokens, temperature=each, seed=seed) for each in temperatures]
    with options.progress("decoding", len(asked) * rounds * len(params), quiet=json) as advance:
        measured = measure(llm, names, asked, params, rounds, advance, samples)
    command = options.command_line()
    document: dict[str, Any] = {
        "model": model,
        "suite": suite,
        "temperature": params[0].temperature if len(params) == 1 else None,
        "command": command,
    } | measured
    if report is not None:
        write_report(document, report)
    if json:
        options.emit(document)
        return
    columns = CANVAS_COLUMNS if llm.model.config.fills_canvas else COLUMNS
    for each in params:
        rows = [row for row in document["rows"] if row["temperature"] == each.temperature]
        if len(params) > 1:
            print(f"temperature {each.temperature:g}")
        if suite == SPEC_BENCH:
            print(table(rows))
        else:
            _print(rows, columns)


def _temperatures(text: str) -> list[float]:
    """One or more, the lowest first.

    Raises:
        UserError: no numbers.
    """
    try:
        return sorted({float(each) for each in text.split(",")})
    except ValueError:
        raise UserError(f"temperature must be a number, or several with commas between them, not {text!r}") from None


COLUMNS = {
    "tokens\n/step": ("tokens_per_step", "{:.2f}"),
    "tokens\n/s": ("tokens_per_second", "{:.0f}"),
    "speedup": ("speedup", "{:.2f}"),
    "predicted": ("predicted_speedup", "{:.2f}"),
    "accepted": ("acceptance", "{:.0%}"),
    "right": ("accuracy", "{:.0%}"),
}
"""Heads of the table, with the rows' keys and how they are written."""
CANVAS_COLUMNS = {head: COLUMNS[head] for head in ("tokens\n/step", "tokens\n/s", "speedup", "right")} | {
    "rows\n/token": ("rows_per_token", "{:.0f}"),
    "agrees": ("agreement", "{:.0%}"),
}
"""The same for models that fill masked positions: few of their methods draft, and few texts are identical."""


def _print(rows: list[dict[str, Any]], columns: Mapping[str, tuple[str, str]]) -> None:
    """A block per method, a line per category; 80 characters wide."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("category")
    for head in (*columns, "identical"):
        table.add_column(head, justify="right", no_wrap=True)
    method = None
    for row in rows:
        if row["method"] != method:
            method = row["method"]
            table.add_row(method, style="bold")
        cells = ["-" if row[key] is None else pattern.format(row[key]) for key, pattern in columns.values()]
        table.add_row(f"  {row['category']}", *cells, f"{row['identical']}/{row['prompts']}")
    Console(highlight=False, markup=False).print(table)
