"""Filling: a denoiser decides the positions of a canvas, in any order, and the text is what no mask stands before."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress

import torch

from hasten.engine.canvas.canvas import Canvas
from hasten.engine.canvas.denoiser import Denoiser
from hasten.engine.decoding import Answer
from hasten.engine.passage import Passage
from hasten.engine.report import TokenKind
from hasten.engine.request import Request
from hasten.errors import UserError
from hasten.model import ModelConfig
from hasten.model.decoder import NOT_FINITE


class Filling:
    """A canvas, the denoiser's generator over it, and the passage that it waits for.

    Args:
        request: that it is for.
        denoiser: fills the canvas.
        config: of the model.
        end_ids: tokens that end the text.

    Raises:
        UserError: parameters that a canvas cannot serve.
    """

    def __init__(self, request: Request, denoiser: Denoiser, config: ModelConfig, end_ids: Collection[int]) -> None:
        params = request.params
        assert config.diffusion is not None
        asked = {
            "embeddings": request.spans,
            "a constraint": params.constraint is not None,
            "logprobs": params.logprobs is not None,
            "prompt_logprobs": params.prompt_logprobs is not None,
            "min_tokens": params.min_tokens,
            "bad_words": params.bad_words,
        }
        what = next((name for name, given in asked.items() if given), None)
        if what is not None:
            raise UserError(f"{what} cannot be had from a model that fills masked positions in any order")
        length = denoiser.canvas_length(request, config)
        ends = params.endings(end_ids)
        self.canvas = Canvas(request.tokens, length, config.diffusion.mask_id, request.sampler, ends)
        self._passes = denoiser.decode(request, self.canvas)
        self._passage: Passage | None = None
        self._begun = False

    @property
    def exhausted(self) -> bool:
        return self._passage is None or self.canvas.finished

    @property
    def drafted(self) -> int:
        return 0

    def backlog(self, request: Request) -> int:
        return 0

    def slots(self, request: Request) -> int:
        """Of the whole canvas."""
        return self.canvas.length

    def passage(self, request: Request, piece: int) -> Passage:
        """The denoiser's; the first one is made when it is asked for."""
        if not self._begun:
            self._begun, self._passage = True, next(self._passes, None)
        assert self._passage is not None
        return self._passage

    def receive(self, request: Request, answer: Answer) -> list[int]:
        """What became final.

        Raises:
            UserError: logits that are not finite.
        """
        if not all(answer.finite):
            raise UserError(NOT_FINITE)
        passage, statistics = self._passage, request.statistics
        assert passage is not None
        if passage.prompt:
            statistics.prompt_rows += len(passage.tokens)
        else:
            statistics.rows += len(passage.tokens)
        accepted, looked = statistics.accepted, bool(passage.wanted) or not passage.prompt
        if looked:
            self.canvas.steps += 1
        self._passage = None
        with suppress(StopIteration):
            self._passage = self._passes.send(answer.logits)
        if looked:
            statistics.steps += 1
            statistics.accepted_per_step.append(statistics.accepted - accepted)
        return self.canvas.fresh()

    def keep(self, request: Request, tokens: Sequence[int]) -> list[TokenKind]:
        if not tokens:
            return []
        steps = self.canvas.committed_at[len(request.tokens) : len(request.tokens) + len(tokens)]
        alone = torch.bincount(self.canvas.committed_at)[steps] == 1
        return ["plain" if single else "accepted" for single in alone.tolist()]

    def observe(self, request: Request, tokens: Sequence[int]) -> None:
        """Nothing: the denoiser has seen its logits."""

    def close(self) -> None:
        self._passes.close()
