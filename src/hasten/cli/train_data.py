"""What drafters are trained on, as options of the commands that train them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hasten.cli import options
from hasten.files import cache_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hasten.llm import LLM
    from hasten.train.heads.budget import Budget
    from hasten.train.heads.dialogues import Dialogue, Writing
    from hasten.train.heads.states import Tap


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

    budget: Annotated[
        float,
        typer.Option(help="Minutes for all of it: fewer dialogues and epochs where there would be too many; 0: any."),
    ] = 0.0

    def clock(self, folder: Path) -> Budget | None:
        """The budget of a run in a folder, from now on; None without one.

        Raises:
            UserError: no number of minutes.
        """
        from hasten.train.heads.budget import Budget

        return Budget(self.budget, folder) if self.budget else None

    def write(self, llm: LLM, quiet: bool, budget: Budget | None) -> tuple[Path, list[Dialogue]]:
        """Make dialogues, or take those that are there.

        Returns:
            Their folder, and they.

        Raises:
            UserError: unreadable prompts, or what is there was made in another way.
        """
        from hasten.train import processes
        from hasten.train.heads.dialogues import Writing, read_prompts, write_dialogues
        from hasten.train.heads.recipe import DIALOGUES

        how = Writing(self.dialogues, answer=self.answer)
        prompts = None if self.prompts is None else read_prompts(self.prompts)
        folder = self.folder or cache_folder("dialogues") / f"{llm.folder.name}-{_digest(how, prompts)}"
        quiet = quiet or not processes.first()
        with processes.first_alone(), options.progress("asking", how.count, quiet=quiet) as advance:
            enough = (lambda: False) if budget is None else (lambda: budget.talked)
            return folder, write_dialogues(llm, folder / DIALOGUES, how, prompts, advance, enough)


@dataclass(frozen=True)
class Data(Talk):
    """What heads are trained on: dialogues, and the hidden states of the target along them."""

    states_bytes: Annotated[str, typer.Option(help="Most that hidden states may take on disk.")] = "8GiB"

    def make(self, llm: LLM, taps: Sequence[Tap], states: str, quiet: bool, budget: Budget | None) -> tuple[Path, int]:
        """Make dialogues and read hidden states, or take those that are there.

        Returns:
            Their folder, and the rows of all dialogues.

        Raises:
            UserError: unreadable prompts, or what is there was made in another way.
        """
        from hasten.engine.memory import parse_bytes
        from hasten.train import processes
        from hasten.train.heads.states import read_states

        most = parse_bytes(self.states_bytes, "states-bytes")
        folder, dialogues = self.write(llm, quiet, budget)
        quiet = quiet or not processes.first()
        with processes.first_alone(), options.progress("reading", len(dialogues), quiet=quiet) as advance:
            read = read_states(llm, dialogues, taps, folder / states, most, advance)
        return folder, len(read.tokens)


def _digest(how: Writing, prompts: Sequence[str] | None) -> str:
    """Eight digits that tell apart how dialogues are made."""
    return hashlib.sha256(repr((how, prompts)).encode()).hexdigest()[:8]
