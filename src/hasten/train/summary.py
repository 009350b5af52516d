"""What a run that is complete says of itself, and whether one that is there was this run's."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hasten.errors import UserError
from hasten.model.checkpoint import read_json
from hasten.train import processes
from hasten.train.recipe import AnyRecipe
from hasten.train.settings import complete, differences

SUMMARY = "training.json"
_TOLD = {"parameters", "tokens", "seconds", "loss", "data_sha256", "config"}
"""By every summary, for cards."""


def read_summary(recipe: AnyRecipe, file: Path) -> dict[str, Any]:
    """The summary of a run that is complete.

    Raises:
        UserError: it was another run's, or is damaged.
    """
    summary = read_json(file)
    if not summary.keys() >= _TOLD or not isinstance(summary["config"], dict):
        raise UserError(f"{file} is damaged, or no summary of a training")
    if changed := differences(complete(recipe, summary["config"]), asdict(recipe)):
        raise UserError(f"the model in {file.parent} was made with another {changed}")
    if processes.first():
        print(f"{file.parent} has the model already: it is not trained again", file=sys.stderr)
    return summary
