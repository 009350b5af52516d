"""hasten, in the interpreter that runs the comparison."""

from __future__ import annotations

from typing import Any

import torch

from hasten import LLM, SamplingParams
from hasten.bench.lane import engine_for
from hasten.model import Rows
from workers.protocol import Answer, Clock, Settings, Worker

OPTIONS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "weights": "int8"},
    "int4": {"dtype": "bfloat16", "weights": "int4"},
    "stored": {},
}
"""How a model of each precision is loaded."""


class Hasten(Worker):
    """A model; every `begin` makes a new engine, whose drafters have learned nothing yet."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        self.llm = LLM(settings.model, **OPTIONS[settings.precision])
        self.draft = settings.draft

    def _method(self, speculation: str | None) -> str:
        return (speculation or "plain").replace("draft-model", f"draft-model:model={self.draft}")

    def begin(self, speculation: str | None) -> None:
        self.engine = engine_for(self.llm)
        self.engine.drafter(self._method(speculation))

    def run(self, prompts: list[list[int]], max_tokens: int, speculation: str | None) -> Answer:
        params, method = SamplingParams(max_tokens=max_tokens, ignore_eos=True), self._method(speculation)
        prefill = None
        clock = Clock()
        requests = [self.engine.add(prompt, params, method)[0] for prompt in prompts]
        while self.engine.busy:
            self.engine.step()
            if prefill is None and all(request.started for request in requests):
                prefill = clock()
        for request in requests:
            if request.error is not None:
                raise request.error
        tokens = [request.output for request in requests]
        return Answer(tokens, clock(), prefill)

    def logits(self, prompt: list[int]) -> Any:
        sequence = self.llm.engine.cache.sequence()
        try:
            return self.llm.model.forward(Rows.of(sequence, prompt, 0)).numpy()
        finally:
            sequence.release()


def load(settings: Settings) -> Worker:
    return Hasten(settings)
