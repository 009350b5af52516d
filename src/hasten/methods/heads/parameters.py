"""Parameters that heads have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hasten.errors import UserError


@dataclass(frozen=True)
class TreeParameters:
    """Of a tree of a head's likeliest tokens.

    Attributes:
        head: the folder of the heads; by default that beside the target.
        nodes: of the tree, at most.
        sized: whether only those are verified that pay on this machine.
        ranks: tokens of each level, or children of each node, at most.
        tree: `dynamic`, by the heads' own probabilities, or `static`, by how often each rank is right.

    Raises:
        UserError: out of range.
    """

    slug: ClassVar[str]
    counted: ClassVar[tuple[str, ...]] = ("nodes", "ranks")
    """Fields from 1 to 64."""

    head: str = ""
    nodes: int = 15
    sized: bool = True
    ranks: int = 10
    tree: str = "dynamic"

    def __post_init__(self) -> None:
        for name in self.counted:
            if not 1 <= getattr(self, name) <= 64:
                raise UserError(f"{self.slug}: {name} must be between 1 and 64")
        if self.tree not in ("dynamic", "static"):
            raise UserError(f"{self.slug}: tree must be dynamic or static, not {self.tree!r}")


@dataclass(frozen=True)
class GrowingParameters(TreeParameters):
    """Of a tree that grows level by level. Attributes beside those of all trees:

    width: nodes of a level that may have children, at most.
    least: a level's nodes have children where their probabilities come to that much together.
    """

    counted: ClassVar[tuple[str, ...]] = ("nodes", "ranks", "width")

    ranks: int = 8
    width: int = 8
    least: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.least <= 1:
            raise UserError(f"{self.slug}: least must be between 0 and 1")
