"""The settings that something was made with, held against those of a run which goes on with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from hasten.train.recipe import AnyRecipe


def differences(given: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Names of the settings that are not the same in both, with commas between; empty if all are."""
    missing = object()
    return ", ".join(key for key in {**wanted, **given} if given.get(key, missing) != wanted.get(key, missing))


def complete(recipe: AnyRecipe, config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings; those that there were none of when it was made are what they are by default."""
    return {each.name: each.default for each in fields(recipe) if each.default is not MISSING} | dict(config)
