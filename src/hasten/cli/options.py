"""Options that several commands share, and the helpers every command needs. Nothing here imports PyTorch at load."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import streams
from hasten.documents import dumps
from hasten.errors import UserError

if TYPE_CHECKING:
    from hasten.engine import Constraint
    from hasten.llm import LLM

Model = Annotated[
    str, typer.Option("--model", "-m", help="Checkpoint folder, GGUF file, hub id, or a name (see `hasten models`).")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else.")]
Chat = Annotated[
    bool, typer.Option("--chat", help="A prompt is what a user says: put it through the checkpoint's chat template.")
]
Backend = Annotated[str, typer.Option("--backend", help="Of the forward pass: auto, native (CPU), cuda or torch.")]
Threads = Annotated[int, typer.Option("--threads", help="CPU threads; 0 takes all cores.")]
Method = Annotated[str, typer.Option("--method", help="slug, or slug:key=value,key=value (see `hasten methods`).")]
Chosen = Annotated[
    str | None,
    typer.Option("--method", help="slug, or slug:key=value,key=value (default: one that fits the model, often ngram)."),
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="New tokens at most.")]


@dataclass(frozen=True)
class Loading:
    """How a model is loaded: as a command's default, an option each (`hasten.cli.groups`)."""

    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, float16 or float64.")] = "auto"
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, ...")] = "auto"
    backend: Backend = "auto"
    weights: Annotated[
        str, typer.Option("--weights", help="dense, or rounded at loading: int8 or int4 (native only).")
    ] = "dense"
    numerics: Annotated[
        str, typer.Option("--numerics", help="default, or invariant: no row depends on those beside it, on a GPU, too.")
    ] = "default"
    threads: Threads = 0

    def load(self, model: str, **more: Any) -> LLM:
        """The model, with PyTorch's threads set.

        Args:
            more: arguments of `LLM` that are no options here.

        Raises:
            UserError: from loading, or a thread count that cannot be.
        """
        from hasten.llm import LLM

        _quieten()
        given = dict(vars(self))
        set_threads(given.pop("threads"))
        return LLM(model, **given, **more)


@dataclass(frozen=True)
class ForDecoding(Loading):
    """How a model is loaded that decodes: its KV cache may have a limit, too."""

    cache_bytes: Annotated[
        str | None,
        typer.Option(
            "--cache-bytes", help="Limit of the KV cache, such as 2GiB (default: $HASTEN_CACHE_BYTES, or none)."
        ),
    ] = None


def _quieten() -> None:
    """transformers tells errors only; it may be imported later, or not at all."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def set_threads(count: int) -> None:
    """PyTorch computes on so many threads from now on; 0 leaves it at all cores.

    Raises:
        UserError: below 0, or more than there are cores: they would only wait for each other.
    """
    import torch

    from hasten.model.threads import cores

    if not 0 <= count <= cores():
        raise UserError(f"threads must be between 0 (all cores) and {cores()}, the cores that there are, not {count}")
    if count:
        torch.set_num_threads(count)


def constraint(json_schema: str | None, regex: str | None, grammar: str | None) -> Constraint | None:
    """The one constraint that was given, if any; a schema that does not begin like one is a file's name.

    Raises:
        UserError: several constraints, a file that cannot be read, a schema that is not JSON.
    """
    if json_schema is None and regex is None and grammar is None:
        return None
    from hasten.engine import Constraint

    if json_schema is not None:
        inline = json_schema.lstrip().startswith("{")
        json_schema = streams.argument("the JSON schema", json_schema) if inline else _read(json_schema)
    if regex is not None:
        regex = streams.argument("the regular expression", regex)
    return Constraint(json_schema, regex, None if grammar is None else _read(grammar))


def _read(path: str) -> str:
    """A file's text; a `UserError` names one that cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path!r}: {getattr(error, 'strerror', None) or error}") from error


def command_line() -> str:
    """The command as it was given, for cards and documents."""
    return shlex.join(["hasten", *sys.argv[1:]])


def emit(document: Any) -> None:
    """One JSON document on stdout, whole whatever signal comes meanwhile; a figure that does not exist is null."""
    text = dumps(document, indent=2, ensure_ascii=not streams.takes_all_characters())
    with streams.uninterrupted():
        print(text, flush=True)


def prompt_text(given: str) -> str:
    """A prompt as it is given on the command line; `-` stands for standard input.

    Raises:
        UserError: it is no UTF-8 text, or cannot be read.
    """
    return streams.standard_input() if given == "-" else streams.argument("the prompt", given)


@contextmanager
def progress(what: str, total: int, quiet: bool) -> Iterator[Any]:
    """A progress bar on stderr; yields a function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
