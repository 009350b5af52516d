"""`hasten bench`: methods side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from hasten.cli import options
from hasten.errors import UserError


def bench(
    methods: Annotated[str, typer.Option(help="Methods, separated by commas (parameters: slug:key=value).")] = "ngram",
    suite: Annotated[str, typer.Option(help="tasks, a category, a task, or a file of prompts.")] = "tasks",
    model: options.Model = "tiny",
    per_task: Annotated[int, typer.Option(help="Held-out prompts of each task.")] = 8,
    rounds: Annotated[int, typer.Option(help="Times the suite is decoded.")] = 1,
    max_tokens: options.MaxTokens = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="When sampling.")] = 1,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = 0,
    json: options.Json = False,
) -> None:
    """Compare methods with plain decoding on a suite, in turns within one run."""
    if per_task < 1 or rounds < 1:
        raise UserError("per-task and rounds must be at least 1")
    llm = options.load(model, dtype, device, threads)

    from hasten.bench.compare import compare
    from hasten.bench.suite import load_suite
    from hasten.engine import SamplingParams

    names = split_methods(methods)
    prompts = load_suite(suite, per_task)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with options.progress("decoding", len(prompts) * rounds, quiet=json) as advance:
        rows = compare(llm, names, prompts, params, rounds, advance)
    if json:
        options.emit({"model": model, "suite": suite, "rows": rows})
    else:
        _print(rows)


def split_methods(text: str) -> list[str]:
    """`a,b:x=1,y=2` to `["a", "b:x=1,y=2"]`: a comma starts a new method unless `key=value` follows it."""
    names: list[str] = []
    for piece in filter(None, (part.strip() for part in text.split(","))):
        key = piece.partition("=")[0]
        if names and "=" in piece and ":" not in key:
            names[-1] += f",{piece}"
        else:
            names.append(piece)
    if not names:
        raise UserError("give at least one method")
    return names


def _print(rows: list[dict[str, object]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("method", "category"):
        table.add_column(column)
    figures = (
        "tokens_per_step",
        "tokens_per_second",
        "speedup",
        "accuracy",
        "acceptance",
        "identical",
        "prompts",
    )
    for column in figures:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        cells = ["-" if row[key] is None else str(row[key]) for key in figures]
        table.add_row(str(row["method"]), str(row["category"]), *cells)
    Console().print(table)
