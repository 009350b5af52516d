"""`hasten verify`: the exactness check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import options
from hasten.cli.groups import grouped
from hasten.cli.options import ForDecoding
from hasten.errors import UserError


@grouped
def verify(
    method: options.Chosen = None,
    model: options.Model = "tiny",
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL (key `prompt` or `turns`) or text file, one per line.")
    ] = None,
    chat: options.Chat = False,
    per_task: Annotated[int, typer.Option(help="Prompts of each shipped task.")] = 6,
    limit: Annotated[
        int | None, typer.Option(help="Questions of each category of a file at most, with all their turns.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens per prompt at most.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the sampling modes.")] = 1,
    loading: ForDecoding = ForDecoding(dtype="float32"),
    json: options.Json = False,
) -> None:
    """Check that a method gives the tokens of plain decoding: greedy and sampling, alone and in mixed batches.

    Exits with status 1 if any prompt differs.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, not {limit}")
    llm = loading.load(model)

    from hasten.bench import verify as check
    from hasten.bench.conversation import as_chat, encode
    from hasten.bench.prompts import limited, load_prompts
    from hasten.bench.race import default_method
    from hasten.bench.suite import load_suite
    from hasten.engine import SamplingParams

    method = default_method(llm.model.config, lossless=True) if method is None else method
    llm.engine.drafter(method)
    suite = load_prompts(prompts) if prompts is not None else load_suite("tasks", per_task)
    if limit is not None:
        suite = limited(suite, limit)
    if chat:
        suite = as_chat(llm, suite)
    ids = encode(llm, suite, SamplingParams(max_tokens=max_tokens))
    modes = len(check.modes_of(max_tokens, seed))
    with options.progress(f"verifying {method}", len(ids) * modes, quiet=json) as advance:
        result = check.verify(llm, method, ids, max_tokens, seed, advance)
    if json:
        options.emit(result.document())
    else:
        print(f"{method}: {result.identical} of {result.prompts} prompts identical")
        for mode, count in result.modes.items():
            print(f"  {mode}: {count} of {result.prompts}")
        if result.proposed:
            share = result.accepted / result.proposed
            print(f"  {result.accepted} of {result.proposed} proposed tokens accepted ({share:.0%})")
        if result.first_divergence is not None:
            print(f"  first divergence: {result.first_divergence}")
    if result.identical < result.prompts:
        raise typer.Exit(1)
