"""Runs of small drafters for `tiny`."""

from __future__ import annotations

from pathlib import Path

from hasten.train.drafters.align import AlignRecipe

SMALL = {"hidden": 48, "layers": 2, "attention_heads": 2, "kv_heads": 1, "ffn": 96, "words": 400, "precision": "fp32"}


def recipe(folder: Path, kind: type[AlignRecipe] = AlignRecipe, **settings: object) -> AlignRecipe:
    """One on some dialogues."""
    given = {"parent": "tiny", "data": str(folder), "tokens": 8000, "batch_tokens": 512, "lr": 3e-3}
    return kind(**{**given, **SMALL, **settings})  # type: ignore[arg-type]
