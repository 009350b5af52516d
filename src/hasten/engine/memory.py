"""Bytes that decoding takes beside the weights: what a step held, and sizes as people write them."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from hasten.errors import UserError

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
LOGIT_BYTES = 4
"""Logits are float32, whatever the model computes in."""


def parse_bytes(text: str, subject: str) -> int:
    """`64MiB`, `1.5 GB` or a plain number to bytes; units of 1000 (kB, MB, GB) and of 1024 (KiB, MiB, GiB).

    Args:
        subject: whose number it is, for the message.

    Raises:
        UserError: not a size, or not above zero.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in UNITS:
        raise UserError(f"{subject} must be a size such as 64MiB or 1.5GB, not {text!r}")
    count = int(float(match[1]) * UNITS[match[2].lower()])
    if count < 1:
        raise UserError(f"{subject} must be at least one byte, not {text!r}")
    return count


class Footprint(NamedTuple):
    """Bytes by purpose.

    Attributes:
        kv: blocks of the KV cache.
        logits: of the rows that verification looks at.
        masks: boolean, of the drafts that are trees.
        drafter: tables, caches and weights of drafters.
    """

    kv: int = 0
    logits: int = 0
    masks: int = 0
    drafter: int = 0

    @property
    def total(self) -> int:
        return sum(self)


class Ledger:
    """What the steps of an engine held: the latest, and the most by purpose and in sum."""

    def __init__(self) -> None:
        self.last = self.most = Footprint()
        self.peak = 0

    def record(self, step: Footprint) -> None:
        """A step was computed."""
        self.last, self.peak = step, max(self.peak, step.total)
        self.most = Footprint(*map(max, self.most, step))


def table_growth(table: Mapping[Any, Any] | None, entries: int) -> int:
    """What a dictionary itself (not what it holds) grows by at most, with so many entries more; None is a new one.

    A dictionary that is full is made anew, at a few times its size.
    """
    if not entries:
        return 0
    return 128 * entries + 64 if table is None else 4 * sys.getsizeof(table)


def mask_bytes(nodes: int) -> int:
    """Of the boolean mask of a tree of so many nodes and its root."""
    return (nodes + 1) ** 2


def logits_bytes(rows: int, vocabulary: int) -> int:
    """Of so many rows' logits."""
    return rows * vocabulary * LOGIT_BYTES
