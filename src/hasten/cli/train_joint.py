"""`hasten train medusa --joint`: heads, and the model that learns with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import options
from hasten.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hasten.llm import LLM
    from hasten.train.heads.joint import JointRecipe

COMPARED = 200
"""Dialogues that were held out, at most, on which the model is compared with what it was."""


@dataclass(frozen=True)
class Joint:
    """How a model learns with its heads: as a command's default, an option each (`hasten.cli.groups`)."""

    joint: Annotated[
        bool, typer.Option("--joint", help="Medusa-2: the model learns, too. It becomes another one, in the output.")
    ] = False
    opening: Annotated[float, typer.Option(help="Joint: share of the run in which only the heads learn.")] = 0.4
    base_lr: Annotated[float, typer.Option(help="Joint: the model's learning rate, a quarter of the heads'.")] = 1e-4
    weight: Annotated[float, typer.Option(help="Joint: of what heads tell the model.")] = 0.01
    rank: Annotated[int, typer.Option(help="Joint: of the model's adapters.")] = 32
    per_task: Annotated[int, typer.Option(help="Joint: held-out examples of each task for the card.")] = 50

    def recipe(self, output: Path | None, **settings: Any) -> tuple[JointRecipe, Path]:
        """A recipe without its data, and where it is run.

        Raises:
            UserError: no output; out of range.
        """
        from hasten.train.heads.joint import JointRecipe

        if output is None:
            raise UserError("medusa: --joint makes another model, so --output must say where")
        own: dict[str, Any] = {name: getattr(self, name) for name in ("rank", "opening", "base_lr", "weight")}
        return JointRecipe(**own, **settings), output

    def conclude(self, llm: LLM, folder: Path, recipe: JointRecipe, summary: Mapping[str, Any], json: bool) -> LLM:
        """Compare the model in a folder with what it was, and write its card.

        Returns:
            The model.
        """
        from hasten.bench.divergence import divergence
        from hasten.llm import LLM
        from hasten.tasks import TASKS
        from hasten.train.card import task_scores
        from hasten.train.heads.dialogues import read_dialogues
        from hasten.train.heads.joint_card import write_joint_card
        from hasten.train.heads.recipe import DIALOGUES, is_held_out

        before, now = LLM(llm.folder, dtype="float32"), LLM(folder, dtype="float32")
        held_out = [each.ids for each in read_dialogues(Path(recipe.data) / DIALOGUES) if is_held_out(each)][:COMPARED]
        with options.progress("comparing", sum(map(len, held_out)), quiet=json) as advance:
            found = divergence(now, before, held_out, advance)
        with options.progress("scoring", 2 * len(TASKS), quiet=json) as advance:
            scores = [task_scores(each, self.per_task, advance) for each in (before, now)]
        command = options.command_line()
        document = {**summary, "command": command, "parent": llm.folder.name}
        write_joint_card(folder, document, found.document(), *scores)
        return now
