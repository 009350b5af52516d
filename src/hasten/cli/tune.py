"""`hasten tune`: which method, with which parameters, for this model and these prompts."""

from __future__ import annotations

import shlex
from math import inf
from typing import Annotated, Any

import typer

from hasten.cli import options
from hasten.cli.groups import grouped
from hasten.cli.options import ForDecoding
from hasten.errors import UserError


@grouped
def tune(
    prompts: Annotated[str, typer.Option(help="JSONL or text file of prompts, or a shipped suite (see bench).")],
    model: options.Model = "tiny",
    seconds: Annotated[float, typer.Option(help="Time to spend.")] = 120.0,
    candidates: Annotated[
        str | None, typer.Option(help="Methods to try, separated by commas (default: all that need no training).")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens per prompt at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="When sampling.")] = 1,
    chat: options.Chat = False,
    loading: ForDecoding = ForDecoding(),
    json: options.Json = False,
) -> None:
    """Find the method that decodes these prompts fastest on this machine, in a given time.

    Candidates are timed in turns with plain decoding; the better half goes on to more prompts, until one is left. Half
    of the prompts are held back to check it. Ctrl-C prints what is known so far.
    """
    if not 0 < seconds < inf:
        raise UserError("seconds must be positive, and finite")
    from hasten.engine.specification import split_methods

    names = None if candidates is None else split_methods(candidates)
    llm = loading.load(model)

    from hasten.bench import tune as tuning
    from hasten.bench.conversation import as_chat
    from hasten.bench.suite import load_suite
    from hasten.engine import SamplingParams

    suite = load_suite(prompts, tokenizer=llm.tokenizer)
    if chat:
        suite = as_chat(llm, suite)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with options.progress("tuning (seconds)", round(seconds), quiet=json) as advance:
        result = tuning.tune(llm, suite, params, seconds, names, advance)
    document = {"model": model, "prompts": prompts} | result.document()
    command = ["hasten", "generate", "PROMPT", "--model", model, "--method", result.choice]
    document["command"] = shlex.join([*command, "--chat"] if chat else command)
    if json:
        options.emit(document)
    else:
        _print(document)
    if result.interrupted is not None:
        raise result.interrupted


def _print(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("method", "speedup", "tokens per step", "prompts", "rung"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in document["candidates"]:
        figures = ["-" if row[key] is None else f"{row[key]:.2f}" for key in ("speedup", "tokens_per_step")]
        note = "" if row["lossless"] else " (lossy)"
        table.add_row(row["method"] + note, *figures, str(row["prompts"]), str(row["rung"]))
    console.print(table)
    console.print("Each rung went on to further prompts: compare speedups within a rung.", style="dim")
    for entry in document["skipped"]:
        console.print(f"skipped {entry['method']}: {entry['reason']}", style="dim")
    if document["interrupted"]:
        console.print("interrupted: this is what was known by then")
    gain = document["expected_speedup"]
    expected = "" if gain is None else f", {gain:.2f} times plain decoding"
    checked = f" on {document['held_out_prompts']} held-out prompts" if document["held_out_prompts"] else ""
    console.print(f"choice: {document['choice']}{expected}{checked} ({document['reason']})")
    console.print(f"use it: {document['command']}", soft_wrap=True)
