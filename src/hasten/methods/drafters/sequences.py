"""A drafter's own caches of requests: committed rows only, and a draft's rows pending behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hasten.cache import Cache, SequenceCache
from hasten.engine import ROOT, Request

HEADROOM = 64
"""Slots set aside for a draft's pending rows; a larger draft makes its cache grow."""


class Sequences(dict[int, SequenceCache]):
    """By the requests' ids; each is made when it is first asked for.

    Args:
        cache: that counts their bytes.
        length: tokens of the text that the drafter reads of a request.
        headroom: slots set aside for a draft's pending rows.
    """

    def __init__(
        self,
        cache: Cache,
        length: Callable[[Request], int] = lambda request: len(request.tokens),
        headroom: int = HEADROOM,
    ) -> None:
        super().__init__()
        self.cache, self._length, self._headroom = cache, length, headroom

    def of(self, request: Request) -> SequenceCache:
        """A request's, with room for what it is likely to need."""
        sequence = self.get(request.id)
        if sequence is None:
            sequence = self[request.id] = self.cache.sequence()
            sequence.reserve(self._slots(self._length(request), request.stopper.left))
        return sequence

    def drop(self, request: Request) -> None:
        """A request is over, whether it had one or not."""
        sequence = self.pop(request.id, None)
        if sequence is not None:
            sequence.release()

    def growth_bytes(self, requests: Sequence[Request]) -> int:
        """What the cache grows by, at most, when drafts of these requests are begun."""
        return sum(self.growth_of(each.id, self._length(each), each.stopper.left) for each in requests)

    def growth_of(self, request: int, length: int, left: int) -> int:
        """The same of one request.

        Args:
            request: its id.
            length: tokens of the text that is read.
            left: that may still come.
        """
        sequence = self.get(request)
        if sequence is None:
            return self.cache.sequence_bytes(self._slots(length, left))
        if length - sequence.length + self._headroom > sequence.room:
            # A block that is outgrown is copied to one of twice its size.
            return self.cache.sequence_bytes(2 * (sequence.length + sequence.room))
        return 0

    def _slots(self, length: int, left: int) -> int:
        return length + min(left, 512) + self._headroom


class Branches:
    """The pending rows of one draft: which of them each node sees, as it grows level by level."""

    def __init__(self) -> None:
        self._above: dict[int, list[int]] = {ROOT: []}

    def row(self, node: int) -> int | None:
        """The number of a node's row; None where it was not fed."""
        return self._above[node][-1] if node in self._above else None

    def feed(self, nodes: Sequence[int], parents: Sequence[int]) -> Tensor | None:
        """Number nodes behind the rows fed before; boolean [nodes, fed] says which rows each one sees.

        None where a single row sees all of them.

        Args:
            nodes: whose rows are fed next.
            parents: of all nodes; those of these were fed before, or are ROOT.
        """
        for node in nodes:
            self._above[node] = [*self._above[parents[node]], len(self._above) - 1]
        fed = len(self._above) - 1
        if len(nodes) == 1 and len(self._above[nodes[0]]) == fed:
            return None
        mask = np.zeros((len(nodes), fed), dtype=bool)
        for row, node in enumerate(nodes):
            mask[row, self._above[node]] = True
        return torch.from_numpy(mask)
