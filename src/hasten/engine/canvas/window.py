"""How a canvas is looked at: which rows a forward pass computes, and what the cache keeps of them.

`FullWindow` is for models whose positions all see each other, `BlockWindow` for those that finish one block before the
next. Both are written as generators: they yield passages and are sent the logits of the rows that these want.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from hasten.cache import SequenceCache
from hasten.engine.canvas.canvas import Canvas
from hasten.engine.canvas.view import Hypothesis, View
from hasten.engine.passage import Passage
from hasten.model import DiffusionConfig

Passes = Generator[Passage, Tensor, None]
Look = Generator[Passage, Tensor, list[View]]
CHUNK = 512
"""Rows of finished text that one pass brings into the cache."""


class Window(Protocol):
    """What a denoiser sees of canvas, cache and model."""

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Start and end of each block, in order, as far as the canvas reaches."""

    def open(self, start: int, stop: int) -> Passes:
        """Begin a block: everything before it is finished."""

    def look(self, low: int, high: int, hypotheses: Sequence[Hypothesis] = (), beyond: bool = False) -> Look:
        """A forward pass over what is needed to predict the positions `low` to `high` of the open block.

        Args:
            hypotheses: contents of the open block to be looked at instead of the canvas's own; all in one pass.
            beyond: also predict what is behind `high`, where the pass computes it anyway.

        Returns:
            A view of the canvas, or one per hypothesis.
        """


def _blocks(canvas: Canvas, start: int, size: int) -> Iterator[tuple[int, int]]:
    """Blocks of `size` positions from `start` on, as far as the canvas reaches when each is asked for."""
    while start < canvas.length:
        yield start, min(start + size, canvas.length)
        start += size


def _passage(contents: Sequence[list[int]], bottom: int, predicted: range, shift: int) -> Passage:
    """Rows from position `bottom` on, once per hypothesis; these see nothing of each other.

    Args:
        contents: the tokens of each hypothesis, equally many.
        predicted: positions whose predictions are wanted.
        shift: how far before its position a prediction's row stands.
    """
    size, count = len(contents[0]), len(contents)
    mask: Tensor | Literal["all"] = "all"
    if count > 1:
        number = torch.arange(size * count) // size
        mask = number[:, None] == number[None, :]
    return Passage(
        [token for tokens in contents for token in tokens],
        list(range(bottom, bottom + size)) * count,
        [number * size + position - shift - bottom for number in range(count) for position in predicted],
        mask,
    )


class FullWindow:
    """Every position sees every other: a pass computes the whole canvas, or less with a cache (Fast-dLLM, 2505.22618).

    `prefix` keeps keys and values of what is before the block, `dual` of what is behind it, too, from a pass over the
    whole canvas when the block is opened; they are stale from the next step on. That pass is the block's first look.

    Args:
        sequence: the request's cache, empty.
        block: positions per block; the last block ends with the canvas.
        cache: what is kept.
        refresh: a pass over the whole canvas every so many looks, 0 for only when a block is opened.
    """

    def __init__(
        self, canvas: Canvas, sequence: SequenceCache, config: DiffusionConfig, block: int, cache: str, refresh: int
    ) -> None:
        self.canvas, self.sequence, self.size, self.cache, self.refresh = canvas, sequence, block, cache, refresh
        self.shift = 1 if config.alignment == "shifted" else 0
        self.start = self.stop = self.age = 0
        # SequenceCache before the block, and positions behind it in the slots after these.
        self._cached = (0, range(0))

    def blocks(self) -> Iterator[tuple[int, int]]:
        return _blocks(self.canvas, self.canvas.prompt_length, self.size)

    def open(self, start: int, stop: int) -> Passes:
        self.start, self.stop, self.age = start, stop, 0
        return
        yield

    def look(self, low: int, high: int, hypotheses: Sequence[Hypothesis] = (), beyond: bool = False) -> Look:
        canvas, stop = self.canvas, min(self.stop, self.canvas.length)
        high = min(high, stop)
        # A row that predicts the next position stands one before the block.
        first = self.start - self.shift
        bottom, top = 0, canvas.length
        self._drop_cut()
        whole = self.cache == "none" or self.age == 0 or (self.refresh > 0 and self.age % self.refresh == 0)
        if self.cache != "none" and whole:
            self.sequence.crop(0)
        if not whole:
            bottom, top = first, stop if self.cache == "dual" else canvas.length
        until = top if beyond else high
        before, after = canvas.ids[bottom : self.start].tolist(), canvas.ids[stop:top].tolist()
        contents = [each.ids for each in hypotheses] or [canvas.ids[self.start : stop]]
        tokens = [before + ids.tolist() + after for ids in contents]
        logits = yield _passage(tokens, bottom, range(low, until), self.shift)
        if self.cache != "none" and whole:
            behind = range(stop, top) if self.cache == "dual" else range(0)
            self.sequence.commit([*range(first), *behind])
            self._cached = (first, behind)
        self.age += 1
        return _views(canvas, low, high, logits, hypotheses)

    def _drop_cut(self) -> None:
        """Forget cached slots behind the end of a canvas that was cut."""
        first, behind = self._cached
        if behind and self.canvas.length < behind.stop:
            kept = range(behind.start, max(behind.start, self.canvas.length))
            self.sequence.evict(range(first + len(kept), first + len(behind)))
            self._cached = (first, kept)


class BlockWindow:
    """Blocks are finished one after the other, and see what is before them in the cache, exactly.

    With `block-causal` attention finished text sees all of its own block, and blocks are counted from position 0, so
    that the first one may begin with the end of the prompt; with `context-causal` it sees what is before it only, and
    blocks are counted from the end of the prompt. The pass that brings a finished block into the cache also predicts
    the first token of the next one where rows predict the position behind their own.

    Args:
        sequence: the request's cache, empty.
        parts: whether a look may compute only the part of a block that is being filled, over keys and values of the
            rest that are stale (Fast-dLLM v2's sub-block cache, 2509.26328).
    """

    def __init__(self, canvas: Canvas, sequence: SequenceCache, config: DiffusionConfig, parts: bool = False) -> None:
        assert config.block is not None
        self.canvas, self.sequence, self.size, self.parts = canvas, sequence, config.block, parts
        self.shift = 1 if config.alignment == "shifted" else 0
        self.causal = config.attention == "context-causal"
        self.start = self.stop = 0
        self._stale: list[int] = []

    def blocks(self) -> Iterator[tuple[int, int]]:
        first = self.canvas.prompt_length
        return _blocks(self.canvas, first if self.causal else first // self.size * self.size, self.size)

    def open(self, start: int, stop: int) -> Passes:
        self._forget()
        self.start, self.stop = start, stop
        canvas = self.canvas
        logits = None
        while self.sequence.length < start:
            low = self.sequence.length
            high = min(start, low + max(self.size, CHUNK // self.size * self.size))
            mask = None
            if not self.causal:
                block = torch.arange(low, high) // self.size
                mask = block[:, None] >= block[None, :]
            # Where the prompt ends inside the block, its first position is known.
            wanted = [high - low - 1] if self.shift and high == start and canvas.masked[start] else []
            logits = yield Passage(
                canvas.ids[low:high].tolist(), range(low, high), wanted, mask, prompt=high <= canvas.prompt_length
            )
            self.sequence.commit(high - low)
        if logits is not None and len(logits):
            View(canvas, start, logits, 1).commit(torch.tensor([True]))

    def look(self, low: int, high: int, hypotheses: Sequence[Hypothesis] = (), beyond: bool = False) -> Look:
        canvas, start, stop = self.canvas, self.start, min(self.stop, self.canvas.length)
        high = min(high, stop)
        until = stop if beyond else high
        if self._stale and not hypotheses and not canvas.masked[low]:
            return (yield from self._look_at_part(low, high))
        self._forget()
        contents = [each.ids for each in hypotheses] or [canvas.ids[start:stop]]
        # The first row of a shifted block predicts the second position; the first one is known.
        first = max(low, start + self.shift)
        logits = yield _passage([ids.tolist() for ids in contents], start, range(first, until), self.shift)
        size = stop - start
        if self.parts and high - low < size and not hypotheses:
            self._stale = list(range(start, stop))
            self.sequence.commit(size)
        return _views(canvas, first, high, logits, hypotheses)

    def _look_at_part(self, low: int, high: int) -> Look:
        """Only the rows `low` to `high`; their slots are made anew, those of the rest of the block stay as they are."""
        base = self.sequence.length - len(self._stale)
        self.sequence.evict([base + slot for slot, position in enumerate(self._stale) if low <= position < high])
        first = low + self.shift
        rows = range(low, high)
        logits = yield Passage(self.canvas.ids[low:high].tolist(), rows, range(len(rows) - self.shift), "all")
        self.sequence.commit(len(rows))
        self._stale = [position for position in self._stale if position not in rows] + list(rows)
        return [View(self.canvas, first, logits, high - first)]

    def _forget(self) -> None:
        """Drop what looks left of the open block."""
        self.sequence.crop(self.sequence.length - len(self._stale))
        self._stale = []


def _views(canvas: Canvas, low: int, high: int, logits: Tensor, hypotheses: Sequence[Hypothesis]) -> list[View]:
    """A view of the canvas from position `low` on, or one per hypothesis."""
    if not hypotheses:
        return [View(canvas, low, logits, high - low)]
    parts = logits.chunk(len(hypotheses))
    return [View(canvas, low, part, high - low, each) for part, each in zip(parts, hypotheses, strict=True)]
