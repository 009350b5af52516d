"""Heads that come with hasten: `assets/heads/NAME/SLUG`, for whoever has the model that they were trained for."""

from __future__ import annotations

from pathlib import Path

from hasten.catalogue.entries import ASSETS
from hasten.methods.heads.files import read_config
from hasten.model import Decoder
from hasten.model.fingerprint import fingerprint

FINGERPRINT = "fingerprint"
"""In a head's configuration, of its target."""


def shipped_head(slug: str, target: Decoder) -> Path | None:
    """The folder of the head that was trained for this very model, in whichever precision; None where there is none."""
    own = fingerprint(target)
    folders = sorted((ASSETS / "heads").glob(f"*/{slug}"))
    return next((folder for folder in folders if read_config(folder).get(FINGERPRINT) == own), None)
