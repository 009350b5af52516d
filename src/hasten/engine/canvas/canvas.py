"""Text under construction: a prompt and the positions behind it, some of them masked, filled in any order."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from hasten.engine.sampling.sampler import Sampler


class Canvas:
    """The text of one request while a denoiser fills it. Positions are absolute; everything is on the CPU.

    Whether a position is masked is stored, never read off its token: a prompt may contain the mask token.

    Args:
        prompt: token ids.
        length: of the canvas, prompt included.
        mask_id: stands where nothing is decided yet.
        sampler: chooses tokens, and is told of each one that is committed.
        end_ids: tokens that end the text.

    Attributes:
        ids: int64 [length].
        masked: bool [length].
        committed_at: int64 [length], the step (from 1) that decided each position; 0 for the prompt and while masked.
        length: positions that count; `truncate` lowers it.
        steps: forward passes so far, those that only read a prompt left out.
    """

    def __init__(
        self, prompt: Sequence[int], length: int, mask_id: int, sampler: Sampler, end_ids: Collection[int] = ()
    ) -> None:
        self.ids = torch.full((length,), mask_id)
        self.ids[: len(prompt)] = torch.tensor(prompt)
        self.masked = torch.arange(length) >= len(prompt)
        self.committed_at = torch.zeros(length, dtype=torch.int64)
        self.prompt_length, self.length, self.mask_id, self.sampler = len(prompt), length, mask_id, sampler
        self.end_ids = torch.tensor(sorted(end_ids), dtype=torch.int64)
        self.steps = 0
        self._shown = len(prompt)

    def masks(self, start: int = 0, stop: int | None = None) -> int:
        """How many positions from `start` to `stop` (the end, if None) are masked."""
        return int(self.masked[start : self.length if stop is None else min(stop, self.length)].sum())

    def commit(self, positions: Tensor, tokens: Tensor) -> None:
        """Decide positions for good.

        Args:
            positions: int64 [n], masked ones.
            tokens: int64 [n].
        """
        assert bool(self.masked[positions].all()), "a decided position is never changed"
        self.ids[positions] = tokens
        self.masked[positions] = False
        self.committed_at[positions] = self.steps
        self.sampler.committed(tokens.tolist())

    def truncate(self, length: int) -> None:
        """The text ends before position `length`: what is behind it is dropped, decided or not."""
        self.length = min(self.length, length)

    def fresh(self) -> list[int]:
        """Tokens that nothing can change any more and that were not handed out yet: no mask stands before them."""
        waiting = self.masked[self._shown : self.length].nonzero()
        stop = self._shown + int(waiting[0]) if len(waiting) else self.length
        tokens: list[int] = self.ids[self._shown : stop].tolist()
        self._shown = max(stop, self._shown)
        return tokens

    @property
    def finished(self) -> bool:
        """Whether everything was handed out."""
        return self._shown >= self.length
