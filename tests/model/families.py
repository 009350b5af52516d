"""Sequences that have begun alike, over several generations: what attention that is shared is tested on."""

from __future__ import annotations

from collections.abc import Callable

from hasten.cache import Cache, SequenceCache


def family(cache: Cache, grow: Callable[[SequenceCache, int], None]) -> list[SequenceCache]:
    """A tree of forks, some cropped, of many lengths; two that have too little in common; one that is empty.

    Args:
        grow: appends so many rows to a sequence.
    """
    root = cache.sequence()
    grow(root, 150)
    child, twin = root.fork(), root.fork()
    grow(child, 33)
    grandchild, cropped, elder = child.fork(), child.fork(), child.fork()
    grow(grandchild, 70)
    # Within what all share, within what some do, and where one sequence wrote behind what the others see.
    cropped.crop(130)
    grow(cropped, 5)
    elder.crop(170)
    grow(root, 9)
    late, latest = root.fork(), grandchild.fork()
    stranger = cache.sequence()
    grow(stranger, 40)
    return [root, stranger, child, twin, grandchild, cropped, elder, stranger.fork(), late, latest, cache.sequence()]
