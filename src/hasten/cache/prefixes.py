"""Texts whose cache outlives their requests, so that a prompt that begins as one of them need not be read again."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hasten.cache.block import Block
from hasten.cache.radix import Node, RadixTree
from hasten.cache.recurrent import RollbackError
from hasten.cache.sequence import SequenceCache

SHORTEST = 16
"""Tokens that a prefix must have to be worth a fork, and so to be kept."""


class _Text(NamedTuple):
    """A text that is kept: whose it is, where it stands in its tenant's tree, its cache."""

    tenant: str
    node: Node[int]
    sequence: SequenceCache


class Prefixes:
    """Caches of finished texts, by tenant; those that were not used for longest go first.

    A fork holds what it reads by itself, so a text may be forgotten at any time.

    Args:
        limit_bytes: what all of them may take.

    Attributes:
        used_bytes: what they take; a block counts once, however many of them, and of those that decode, read it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.used_bytes = limit_bytes, 0
        self._trees: dict[str, RadixTree[int]] = {}
        self._kept: OrderedDict[int, _Text] = OrderedDict()
        self._holders: Counter[Block] = Counter()
        self._next = 0

    def fork(self, tenant: str, tokens: Sequence[int]) -> SequenceCache | None:
        """A sequence with the slots of as many of the first tokens as some text of the tenant begins with.

        The last token is left to be read: its logits are wanted. None where no text has enough of the others.
        """
        wanted = np.asarray(tokens[:-1], dtype=np.int64)
        number, length = next(self._tree(tenant).nearest(wanted), (-1, 0))
        if length < SHORTEST:
            return None
        self._kept.move_to_end(number)
        fork = self._kept[number].sequence.fork()
        try:
            fork.crop(length)
        except RollbackError:
            # A recurrent layer knows its state at the end of the text, and shortly before it, only.
            fork.release()
            return None
        return fork

    def keep(self, tenant: str, tokens: Sequence[int], sequence: SequenceCache) -> None:
        """Take over the sequence of a finished text, one slot per token; it is released if it is not worth keeping."""
        text, tree = np.asarray(tokens, dtype=np.int64), self._tree(tenant)
        if len(text) < SHORTEST:
            return sequence.release()
        number, length = next(tree.nearest(text), (-1, 0))
        if length == len(text):
            # All of it is there already.
            self._kept.move_to_end(number)
            return sequence.release()
        sequence.trim()
        if sequence.nbytes() > self.limit_bytes:
            return sequence.release()
        self._trees[tenant] = tree
        node = tree.add(text, self._next)
        self._kept[self._next] = _Text(tenant, node, sequence)
        self._next += 1
        self._count(sequence, 1)
        # What the text only goes on from.
        for number in node.above():
            self._forget(number)
        while self.used_bytes > self.limit_bytes:
            self.evict()

    def evict(self) -> bool:
        """Forget the text that was not used for longest; whether there was one."""
        if not self._kept:
            return False
        self._forget(next(iter(self._kept)))
        return True

    def _tree(self, tenant: str) -> RadixTree[int]:
        return self._trees.get(tenant) or RadixTree()

    def _forget(self, number: int) -> None:
        tenant, node, sequence = self._kept.pop(number)
        self._trees[tenant].remove(node, number)
        if not self._trees[tenant]:
            del self._trees[tenant]
        self._count(sequence, -1)
        sequence.release()

    def _count(self, sequence: SequenceCache, holders: int) -> None:
        """Enter what a text holds as it comes (1) or goes (-1)."""
        blocks = [block for group in range(len(sequence.groups)) for block, _ in sequence.memory(group) or ()]
        # Recurrent states are nobody else's.
        self.used_bytes += holders * (sequence.nbytes() - sum(block.nbytes() for block in blocks))
        for block in blocks:
            if self._holders[block] + min(holders, 0) == 0:
                self.used_bytes += holders * block.nbytes()
            self._holders[block] += holders
            if not self._holders[block]:
                del self._holders[block]

    def __len__(self) -> int:
        return len(self._kept)
