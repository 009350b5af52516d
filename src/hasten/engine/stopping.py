"""End of text, stop strings, grammar's end, token budget, context limit: in one place, inside the accepted run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from hasten.engine.sampling.params import SamplingParams
from hasten.engine.text import Detokenizer, special_tokens

FinishReason = Literal["stop", "length", "abort", "error"]
"""`stop`: end of text, a stop string or token, or the end of a constraint; `length`: of budget or context, or where a
constraint asks for what the tokenizer cannot write; `abort`: given up; `error`: its drafter, grammar or canvas failed
(`Request.error`)."""


class Stopper:
    """Decides where a request's output ends, and turns it into text where somebody reads along.

    Args:
        params: stop strings and tokens, token budget, ignore_eos.
        end_ids: end-of-text ids of the model.
        tokenizer: needed for stop strings and text; None for models without one.
        room: tokens that the context still holds.
        read: keep the text up to date token by token (streaming).
    """

    def __init__(self, params: SamplingParams, end_ids: Collection[int], tokenizer: Any, room: int, read: bool) -> None:
        # Special tokens are not in the text, where other strings are looked for.
        special = special_tokens(tokenizer) if params.stop else {}
        self._end = params.endings(end_ids).union(special[stop] for stop in params.stop if stop in special)
        self._stops, self._waiting, self._floor = params.stop, params.min_tokens, 0
        self._left = room if params.max_tokens is None else min(room, params.max_tokens)
        reads = tokenizer is not None and (read or params.stop)
        self._detokenizer = Detokenizer(tokenizer, params.skip_special_tokens) if reads else None
        self._shown = 0
        self._cut: int | None = None
        self.reason: FinishReason | None = None
        self.ended_by_token = False
        """Whether the last token is an end, which is no part of the text."""

    @property
    def left(self) -> int:
        """How many more tokens may come."""
        return self._left

    def accept(self, tokens: Sequence[int], last: int | None = None, complete: bool = True) -> int:
        """Take new tokens in order and return how many belong to the output; sets `reason` at the end.

        Args:
            last: the output's grammar ends with this many of them.
            complete: whether the text is a whole one then; otherwise it only cannot go on.
        """
        for count, token in enumerate(tokens, 1):
            self._left -= 1
            self._waiting -= 1
            if token in self._end and self._waiting < 0:
                self.reason, self.ended_by_token = "stop", True
            elif self._detokenizer is not None and self._detokenizer.push(token):
                self._find_stop(self._detokenizer)
            if self.reason is None and count == last:
                self.reason = "stop" if complete else "length"
            if self.reason is None and self._left <= 0:
                self.reason = "length"
            if self.reason is not None:
                # What waits for the rest of a character may still hold a stop string.
                if self._detokenizer is not None and self._cut is None and self._detokenizer.flush():
                    self._find_stop(self._detokenizer)
                return count
        return len(tokens)

    def _find_stop(self, detokenizer: Detokenizer) -> None:
        text = detokenizer.text
        if self._waiting >= 0:
            self._floor = len(text)
            return
        # What was complete before it might end the text does not count.
        starts = {stop: max(0, self._shown, self._floor - len(stop) + 1) for stop in self._stops}
        found = [at for at in (text.find(stop, start) for stop, start in starts.items()) if at >= 0]
        if found:
            self._cut, self.reason = min(found), "stop"

    @property
    def cut(self) -> int | None:
        """Where a stop string cut the text, in characters."""
        return self._cut

    def fresh(self) -> str:
        """Text that may be shown and was not yet: a possible beginning of a stop string is held back."""
        if self._detokenizer is None:
            return ""
        text = self._detokenizer.text
        end = len(text) if self._cut is None else self._cut
        if self.reason is None:
            end -= max((_overlap(text, stop) for stop in self._stops), default=0)
        fresh = text[self._shown : end]
        self._shown = max(self._shown, end)
        return fresh


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
