"""The heads that a target has: beside its checkpoint, or coming with hasten."""

from __future__ import annotations

from itertools import accumulate
from operator import mul
from pathlib import Path

from hasten.engine import Target, decoders
from hasten.errors import UserError
from hasten.methods.heads.files import read_config


def own_heads(target: Target) -> dict[str, Path]:
    """Folders by method: of every lossless one of this family that finds a head for this target by itself."""
    found = {
        slug: method.defaults(target).get("head")
        for slug, method in decoders().items()
        if method.family == "heads" and method.exactness == "lossless"
    }
    return {slug: Path(folder) for slug, folder in found.items() if folder}


def best_head(target: Target) -> str | None:
    """The method whose head promises the most tokens by its card, of those that may stand beside other drafters.

    None where the target has no head of theirs.
    """
    heads = own_heads(target)
    beside = [slug for slug in heads if not getattr(decoders()[slug].create, "alone", False)]
    return max(beside, key=lambda slug: promised(heads[slug]), default=None)


def promised(folder: Path) -> float:
    """Tokens of a chain of each depth's likeliest, by the `accuracy` of a head's card: a share per depth, or per rank.

    0 where the card does not say.
    """
    try:
        table = read_config(folder).get("accuracy")
        if not isinstance(table, list):
            return 0.0
        first = [float(depth[0] if isinstance(depth, list) else depth) for depth in table]
    except (UserError, TypeError, ValueError, IndexError):
        return 0.0
    return float(sum(accumulate(first, mul)))
