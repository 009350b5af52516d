"""A passage: the rows of one request in the next forward pass, and whose logits it wants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hasten.model.rows import Join


@dataclass
class Passage:
    """Rows of one request.

    Attributes:
        tokens, positions: one per row.
        wanted: numbers of the rows whose logits are wanted, ascending.
        mask: which rows see which, as in `hasten.model.rows.Span`.
        embedded: of the rows that are no tokens, the number of the first of each run, and its states [rows, hidden].
        prompt: whether the rows only bring finished text into the cache.
        joins: of those that enter in the middle of the pass, as in `hasten.model.rows.Rows`.
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    wanted: Sequence[int]
    mask: Tensor | Literal["all"] | None = None
    prompt: bool = False
    embedded: Sequence[tuple[int, Tensor]] = ()
    joins: Sequence[tuple[int, int, Join]] = ()
