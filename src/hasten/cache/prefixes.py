"""Texts whose cache outlives their requests, so that a prompt that begins as one of them need not be read again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hasten.cache.recurrent import RollbackError
from hasten.cache.sequence import SequenceCache

SHORTEST = 16
"""Tokens that a prefix must have to be worth a fork, and so to be kept."""
MOST = 256
"""Texts that are kept at most: each is compared with every new prompt."""


class Prefixes:
    """Caches of finished texts, by tenant; those that were not used for longest go first.

    A fork holds what it reads by itself, so a text may be forgotten at any time.

    Args:
        limit_bytes: what all of them may take.

    Attributes:
        used_bytes: what they take; blocks that others read as well count in full.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.used_bytes = limit_bytes, 0
        self._kept: OrderedDict[int, tuple[str, NDArray[np.int64], SequenceCache]] = OrderedDict()
        self._next = 0

    def fork(self, tenant: str, tokens: Sequence[int]) -> SequenceCache | None:
        """A sequence with the slots of as many of the first tokens as some text of the tenant begins with.

        The last token is left to be read: its logits are wanted. None where no text has enough of the others.
        """
        wanted = np.asarray(tokens[:-1], dtype=np.int64)
        best, length = None, SHORTEST - 1
        for number, (owner, known, _) in self._kept.items():
            if owner != tenant:
                continue
            common = min(len(known), len(wanted))
            differing = np.flatnonzero(known[:common] != wanted[:common])
            shared = int(differing[0]) if len(differing) else common
            if shared > length:
                best, length = number, shared
        if best is None:
            return None
        self._kept.move_to_end(best)
        fork = self._kept[best][2].fork()
        try:
            fork.crop(length)
        except RollbackError:
            # A recurrent layer knows its state at the end of the text, and shortly before it, only.
            fork.release()
            return None
        return fork

    def keep(self, tenant: str, tokens: Sequence[int], sequence: SequenceCache) -> None:
        """Take over the sequence of a finished text, one slot per token; it is released if it is not worth keeping."""
        text = np.asarray(tokens, dtype=np.int64)
        if len(text) >= SHORTEST:
            for number, (owner, known, _) in list(self._kept.items()):
                common = min(len(known), len(text))
                if owner == tenant and np.array_equal(known[:common], text[:common]):
                    if len(known) >= len(text):
                        # All of it is there already.
                        self._kept.move_to_end(number)
                        return sequence.release()
                    self._forget(number)
            sequence.trim()
            if sequence.nbytes() <= self.limit_bytes:
                self._kept[self._next] = tenant, text, sequence
                self._next += 1
                self.used_bytes += sequence.nbytes()
                while self.used_bytes > self.limit_bytes or len(self._kept) > MOST:
                    self.evict()
                return
        sequence.release()

    def evict(self) -> bool:
        """Forget the text that was not used for longest; whether there was one."""
        if not self._kept:
            return False
        self._forget(next(iter(self._kept)))
        return True

    def _forget(self, number: int) -> None:
        _, _, sequence = self._kept.pop(number)
        self.used_bytes -= sequence.nbytes()
        sequence.release()

    def __len__(self) -> int:
        return len(self._kept)
