"""`hasten train medusa` and its like: drafters that read the target's hidden states."""

from __future__ import annotations

import hashlib
import shlex
import sys
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import options
from hasten.cli.groups import grouped
from hasten.errors import UserError
from hasten.files import cache_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hasten.llm import LLM
    from hasten.train.heads.dialogues import Dialogue, Writing
    from hasten.train.heads.states import Tap

app = typer.Typer()

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder of the heads (default: beside the model, found there).")
]


@dataclass(frozen=True)
class Talk:
    """The dialogues that are trained on: as a command's default, an option each (`hasten.cli.groups`)."""

    dialogues: Annotated[int, typer.Option(help="How many the model makes, or answers.")] = 4000
    prompts: Annotated[
        Path | None, typer.Option("--data", help="A file of prompts to answer, in place of invented ones.")
    ] = None
    answer: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 256
    folder: Annotated[
        Path | None, typer.Option("--dialogues-folder", help="Where they are kept (default: the user's cache).")
    ] = None

    def write(self, llm: LLM, quiet: bool) -> tuple[Path, list[Dialogue]]:
        """Make dialogues, or take those that are there.

        Returns:
            Their folder, and they.

        Raises:
            UserError: unreadable prompts, or what is there was made in another way.
        """
        from hasten.train.heads.dialogues import Writing, read_prompts, write_dialogues
        from hasten.train.heads.recipe import DIALOGUES

        how = Writing(self.dialogues, answer=self.answer)
        prompts = None if self.prompts is None else read_prompts(self.prompts)
        folder = self.folder or cache_folder("dialogues") / f"{llm.folder.name}-{_digest(how, prompts)}"
        with options.progress("asking", how.count, quiet=quiet) as advance:
            return folder, write_dialogues(llm, folder / DIALOGUES, how, prompts, advance)


@dataclass(frozen=True)
class Data(Talk):
    """What heads are trained on: dialogues, and the hidden states of the target along them."""

    states_bytes: Annotated[str, typer.Option(help="Most that hidden states may take on disk.")] = "8GiB"

    def make(self, llm: LLM, taps: Sequence[Tap], states: str, quiet: bool) -> tuple[Path, int]:
        """Make dialogues and read hidden states, or take those that are there.

        Returns:
            Their folder, and the rows of all dialogues.

        Raises:
            UserError: unreadable prompts, or what is there was made in another way.
        """
        from hasten.engine.memory import parse_bytes
        from hasten.train.heads.states import read_states

        most = parse_bytes(self.states_bytes, "states-bytes")
        folder, dialogues = self.write(llm, quiet)
        with options.progress("reading", len(dialogues), quiet=quiet) as advance:
            read = read_states(llm, dialogues, taps, folder / states, most, advance)
        return folder, len(read.tokens)


def _digest(how: Writing, prompts: Sequence[str] | None) -> str:
    """Eight digits that tell apart how dialogues are made."""
    return hashlib.sha256(repr((how, prompts)).encode()).hexdigest()[:8]


@app.command()
@grouped
def medusa(
    model: options.Model = "smollm2",
    output: Output = None,
    heads: Annotated[int, typer.Option(help="Heads: how many tokens ahead.")] = 4,
    layers: Annotated[int, typer.Option(help="Residual blocks of each.")] = 1,
    words: Annotated[int, typer.Option(help="Tokens that heads may say, the most frequent ones; 0 for all.")] = 8192,
    epochs: Annotated[float, typer.Option(help="Times that every dialogue is seen.")] = 2.0,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 1024,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the order.")] = 0,
    data: Data = Data(),
    resume: Annotated[bool, typer.Option(help="Continue from a checkpoint in the output folder.")] = True,
    backend: options.Backend = "auto",
    threads: options.Threads = 0,
    json: options.Json = False,
) -> None:
    """Train Medusa's heads for a model, on what it says itself (2401.10774).

    Everything is kept: after Ctrl-C the same command goes on.
    """
    llm = options.Loading(backend=backend, threads=threads).load(model)

    from hasten.methods.heads.head import FINAL, beside
    from hasten.train.heads.medusa import MedusaRecipe
    from hasten.train.trainer import train

    # Refuses what cannot be before anything is made.
    settings = MedusaRecipe(
        tokens=1, batch_tokens=batch_tokens, lr=lr, seed=seed, parent=str(llm.folder), words=words, heads=heads,
        layers=layers,
    )  # fmt: skip
    if not 0 < epochs < inf:
        raise UserError(f"epochs must be positive and finite, not {epochs}")
    folder, rows = data.make(llm, (FINAL,), MedusaRecipe.states, json)
    recipe = replace(settings, tokens=max(1, int(epochs * rows)), data=str(folder))
    destination = output or beside(llm.folder, "medusa")
    summary = train(recipe, destination, resume)
    report(destination, {**summary, "command": shlex.join(["hasten", *sys.argv[1:]])}, json)


def report(folder: Path, summary: dict[str, Any], json: bool) -> None:
    """Say what a run has made, and where it is."""
    if json:
        options.emit({"output": str(folder), **summary})
    else:
        print(f"{folder}: {summary['parameters']:,} parameters, loss {summary['loss']}")
