"""`hasten race`: the same text twice, once by one token per pass and once sooner."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import options, pull
from hasten.cli.colours import Coloured
from hasten.cli.groups import grouped
from hasten.cli.options import ForDecoding
from hasten.errors import UserError
from hasten.files import write_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hasten.bench.lane import Lane
    from hasten.engine import SamplingParams
    from hasten.llm import LLM


@grouped
def race(
    prompt: Annotated[str | None, typer.Argument(help="What to complete (default: an edit that ships).")] = None,
    method: options.Chosen = None,
    model: options.Model = "tiny",
    max_tokens: options.MaxTokens = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="When sampling.")] = 1,
    rounds: Annotated[int, typer.Option(help="Timed rounds (the median counts).")] = 5,
    slow: Annotated[float, typer.Option(help="Slow the live view down by this factor.")] = 0.0,
    svg: Annotated[Path | None, typer.Option(help="Save the final picture here.")] = None,
    chat: options.Chat = False,
    loading: ForDecoding = ForDecoding(),
    json: options.Json = False,
) -> None:
    """Decode a prompt plainly and with a method, side by side, live.

    The lanes take turns on the same cores, each on its own clock. Green tokens came from accepted drafts, yellow ones
    are the model's own at the end of a draft.
    """
    if rounds < 1 or not 0 <= slow < inf:
        raise UserError("rounds must be at least 1, slow finite and not negative")
    text = None if prompt is None else options.prompt_text(prompt)
    if not json:
        pull.offer(model)
    llm = loading.load(model)

    from hasten.bench import race as racing
    from hasten.engine import SamplingParams

    method = racing.default_method(llm.model.config) if method is None else method
    llm.engine.drafter(method)
    chosen = racing.DEFAULT_PROMPT if text is None else text
    ids = llm.apply_chat_template([{"role": "user", "content": chosen}]) if chat else llm.encode(chosen)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    if json:
        options.emit(racing.race(llm, ids, method, params, rounds).document())
        return
    _live(llm, ids, method, params, rounds, slow, svg)


def _live(
    llm: LLM, ids: list[int], method: str, params: SamplingParams, rounds: int, slow: float, svg: Path | None
) -> None:
    """One round on the screen (after a silent one that warms up), then the timed rounds."""
    import time

    from rich.console import Console
    from rich.live import Live

    from hasten.bench import race as racing
    from hasten.bench.lane import Lane, engine_for, interleave, reference
    from hasten.engine.creation import is_lossless

    racing.race(llm, ids, method, params, rounds=1)
    console = Console()
    lanes = [
        Lane(llm, engine_for(llm), name, ids, params, read=True) for name in (reference(llm.engine, method), method)
    ]
    shown: list[list[tuple[str, str]]] = [[], []]
    texts = [Coloured(llm.tokenizer) for _ in lanes]
    with Live(console=console, refresh_per_second=30, vertical_overflow="crop") as live:
        started = time.perf_counter()
        for lane, progress in interleave(lanes):
            number = lanes.index(lane)
            for item in progress:
                shown[number] += texts[number].push(item.tokens, item.kinds)
            live.update(_picture(lanes, shown))
            behind = lane.seconds * slow - (time.perf_counter() - started)
            if behind > 0:
                time.sleep(behind)
    result = racing.race(llm, ids, method, params, rounds)
    plain, fast = result.lanes
    different = "[bold red]identical: NO[/]" if is_lossless(method) else "[yellow]identical: no (a lossy method)[/]"
    verdict = "[bold green]identical: yes[/]" if result.identical else different
    figures = (
        f"{verdict}   [bold]{result.speedup:.2f}x[/] sooner   "
        f"{plain['tokens_per_second']:.0f} -> {fast['tokens_per_second']:.0f} tokens/s   "
        f"{fast['tokens_per_step']:.2f} tokens per step   (median of {rounds} rounds)"
    )
    console.print(figures)
    if svg is not None:
        _save(svg, _picture(lanes, shown), figures)


def _save(path: Path, picture: RenderableType, figures: str) -> None:
    """The final view as an SVG that needs nothing from elsewhere (no web fonts)."""
    import io
    import re

    from rich.console import Console

    paper = Console(record=True, width=118, file=io.StringIO(), force_terminal=True)
    paper.print(picture)
    paper.print(figures)
    drawing = re.sub(r"@font-face \{.*?\}", "", paper.export_svg(title="hasten race"), flags=re.DOTALL)
    drawing = drawing.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace")
    write_text(path, re.sub(r"<!--.*?-->\s*", "", drawing, flags=re.DOTALL))


def _picture(lanes: list[Lane], shown: list[list[tuple[str, str]]]) -> RenderableType:
    """Both lanes as they stand."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(expand=True, padding=(0, 1))
    panels: list[Any] = []
    for lane, pieces in zip(lanes, shown, strict=True):
        grid.add_column(ratio=1)
        figures = (
            f"{lane.seconds * 1e3:7.1f} ms  {lane.tokens_per_second:6.0f} tokens/s  "
            f"{lane.request.statistics.tokens_per_step:.2f} per step"
        )
        title = f"{lane.method}{' - done' if lane.done else ''}"
        panels.append(
            Panel(
                Text.assemble(*pieces),
                title=Text(title),
                subtitle=Text(figures),
                border_style="green" if lane.done else "dim",
            )
        )
    grid.add_row(*panels)
    return grid
