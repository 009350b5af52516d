"""Heads with a context of their own: a small network that reads the target's states of a whole text, row by row.

Row p is what the target's states at position p say, and the token behind it. The network's cache holds rows that the
target has verified and nothing else, at their true positions: there is nothing to roll back, whatever was drafted in
between, and a request that was preempted goes on where it was. Rows wait until a draft is asked for; then those of all
requests are read in common passes. A draft's own rows stay pending behind them, level by level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from hasten.cache import Cache, SequenceCache
from hasten.engine import Observation, Request
from hasten.methods.drafters.sequences import Sequences
from hasten.methods.heads.guesses import Guesses
from hasten.methods.heads.head import HeadDrafter
from hasten.methods.heads.sizing import Sizing
from hasten.model import Decoder, Rows, Span, Taps
from hasten.model.taps import Site

READING = 256
"""Rows of all requests that are read in one pass at most: what that takes for a while is bounded."""


def behind(request: Request, places: range) -> list[int]:
    """The tokens behind some positions. Another model's embedding is none: some word stands there."""
    return [max(0, token) for token in request.tokens[places.start + 1 : places.stop + 1]]


class ContextDrafter(HeadDrafter):
    """Drafts from what a network made of the last row of each request.

    State per request: the network's slots of all rows that it has read, the target's states of those that it has not,
    and its output for the last one.

    Args:
        target: whose states are read.
        network: rows enter it as embeddings, the token behind each beside it. It has no rows of tokens.
        own_bytes: of weights, those that are the target's left out.
        guesses, sizing: see `HeadDrafter`.
    """

    taps: tuple[tuple[Site, int], ...]

    output: ClassVar[tuple[Site, int]] = ("output", 0)
    """What of a row drafts begin with."""

    rows: ClassVar[int] = 1
    """What a position is to the network; drafts begin with the last of its rows."""

    def __init__(
        self, target: Decoder, network: Decoder, own_bytes: int, guesses: Guesses, sizing: Sizing | None = None
    ) -> None:
        super().__init__(guesses, sizing)
        self.network, self._own_bytes = network, own_bytes
        self.cache = Cache(network.config.layers, network.cache_dtype, network.device)
        self._sequences = Sequences(self.cache, lambda request: self.rows * len(request.tokens))
        self._unread: dict[int, list[Tensor]] = {}
        self._known: dict[int, int] = {}
        self._last: dict[int, Tensor] = {}
        self._state_bytes = len(self.taps) * target.config.hidden_size * target.dtype.itemsize
        self._last_bytes = network.config.hidden_size * network.dtype.itemsize

    def enter(self, states: Tensor, tokens: Tensor) -> Tensor:
        """What rows enter the network as, [rows, hidden]; whoever reads positions otherwise writes `read` instead.

        Args:
            states: the target's, [rows, taps * hidden], in the order of `taps`.
            tokens: int64 [rows], those behind them.
        """
        raise NotImplementedError

    def knows(self, request: Request) -> bool:
        return self._known.get(request.id) == len(request.tokens) - 1

    def states(self, requests: Sequence[Request]) -> Tensor:
        while pieces := self._pieces(requests):
            self._read(pieces)
        for request in requests:
            sequence = self._sequences.of(request)
            if sequence.pending:
                # Asked again about the same tokens, before the draft was verified.
                sequence.crop(sequence.length)
        return torch.stack([self._last[request.id] for request in requests])

    def advance(self, entering: Tensor, tokens: Tensor | None, positions: Sequence[int], spans: list[Span]) -> Tensor:
        """The network's output [rows, hidden] for some rows, which are left pending.

        Args:
            entering: [rows, hidden].
            tokens: int64 [rows], beside them; None where the network reads none.
            positions: of each.
            spans: which rows are whose, as `span` makes them.
        """
        places = torch.tensor(positions, device=entering.device)
        taps = Taps([self.output])
        self.network.forward(Rows(torch.full_like(places, -1), places, spans, entering, tokens), [], taps)
        return taps[self.output]

    def sequence(self, request: Request) -> SequenceCache:
        """A request's rows, behind which its draft's are left pending."""
        return self._sequences.of(request)

    def span(self, request: Request, start: int, stop: int, mask: Tensor | None) -> Span:
        """Rows `start:stop` of a pass, behind a request's rows and those that its draft has pending (`Branches`)."""
        mask = None if mask is None else mask.to(self.network.device)
        return Span(self.sequence(request), start, stop, mask, extend=True)

    def read(self, states: Tensor, pieces: Sequence[tuple[Request, range]], spans: list[Span]) -> Tensor:
        """The network's output for all rows of some positions, which are left pending.

        Args:
            states: the target's, [positions, taps * hidden].
            pieces: whose positions these are.
            spans: which rows are whose.
        """
        tokens = [token for request, places in pieces for token in behind(request, places)]
        positions = [place for _, places in pieces for place in places]
        beside = torch.tensor(tokens, device=self.network.device)
        return self.advance(self.enter(states, beside), beside, positions, spans)

    def _pieces(self, requests: Sequence[Request]) -> list[tuple[Request, range]]:
        """Which positions are read next."""
        pieces, room = [], READING
        for request in requests:
            first = self._sequences.of(request).length // self.rows
            count = min(self._known[request.id] - first, room)
            if count:
                pieces.append((request, range(first, first + count)))
                room -= count
        return pieces

    def _read(self, pieces: Sequence[tuple[Request, range]]) -> None:
        states: list[Tensor] = []
        spans: list[Span] = []
        stop = 0
        for request, places in pieces:
            count, start = len(places), stop
            waiting = torch.cat(self._unread[request.id])
            states.append(waiting[:count])
            self._unread[request.id] = [waiting[count:]] if count < len(waiting) else []
            stop = start + self.rows * count
            spans.append(Span(self._sequences.of(request), start, stop))
        outputs = self.read(torch.cat(states), pieces, spans)
        for (request, _), span in zip(pieces, spans, strict=True):
            self._sequences.of(request).commit(span.stop - span.start)
            self._last[request.id] = outputs[span.stop - 1].clone()

    # What the target has read

    def observe_prompt(self, request: Request, start: int, taps: Taps | None) -> None:
        assert taps is not None
        self._take(request, start, torch.cat([taps[tap] for tap in self.taps], -1))

    def observe(self, request: Request, seen: Observation) -> None:
        path = [node + 1 for node in seen.path]
        # As a slice where the first rows are kept: at most steps, and sooner.
        kept = slice(len(path) + 1) if path == list(range(1, len(path) + 1)) else [0, *path]
        states = torch.cat([seen.taps[tap][kept] for tap in self.taps], -1)
        self._take(request, len(request.tokens) - len(seen.tokens) - 1, states)
        super().observe(request, seen)

    def _take(self, request: Request, position: int, states: Tensor) -> None:
        """Keep rows from a position on; those that are known (a prompt's last one is shown twice) stay."""
        known = self._known.get(request.id, 0)
        fresh = states[known - position :]
        if len(fresh):
            self._unread.setdefault(request.id, []).append(fresh.clone() if known > position else fresh)
            self._known[request.id] = known + len(fresh)

    def end(self, request: Request) -> None:
        self._sequences.drop(request)
        for kept in (self._unread, self._known, self._last):
            kept.pop(request.id, None)
        super().end(request)

    # Memory

    @property
    def memory_bytes(self) -> int:
        waiting = sum(part.nbytes for parts in self._unread.values() for part in parts)
        return self._own_bytes + self.cache.used_bytes + waiting + self._last_bytes * len(self._last)

    def growth_bytes(self, requests: Sequence[Request], rows: int = 0) -> int:
        if rows:
            return len(requests) * rows * self._state_bytes
        fresh = sum(request.id not in self._last for request in requests)
        return self._sequences.growth_bytes(requests) + fresh * self._last_bytes

    def scratch_bytes(self, requests: Sequence[Request], nodes: int) -> int:
        """The largest pass that reads what these requests have unread, and what enters it."""
        if not requests or nodes < 1:
            return 0
        unread = sum(sum(map(len, self._unread.get(request.id, []))) for request in requests)
        slots = self.rows * max(len(request.tokens) for request in requests) + nodes
        # Joined once as they wait, and once as they enter.
        return 2 * unread * self._state_bytes + self.pass_bytes(self.rows * min(unread, READING), 0, slots)

    def pass_bytes(self, rows: int, masked: int, slots: int) -> int:
        """Of a pass of the network and of what enters it; see `Decoder.scratch_bytes`."""
        entering = rows * (self._state_bytes + 8 * self._last_bytes)
        return entering + self.network.scratch_bytes(rows, masked, slots)
