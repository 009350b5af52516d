"""CTranslate2: static batches, no speculation."""

from __future__ import annotations

import json
from pathlib import Path

import ctranslate2
import numpy as np
from ctranslate2.converters import TransformersConverter

from workers.protocol import Answer, Clock, Settings, Worker


class CTranslate2(Worker):
    """A generator. It speaks tokens as strings; its vocabulary file turns ids into them."""

    def __init__(self, settings: Settings) -> None:
        self.generator = ctranslate2.Generator(
            settings.model, device="cpu", compute_type=settings.precision, intra_threads=settings.threads
        )
        self.vocabulary: list[str] = json.loads((Path(settings.model) / "vocabulary.json").read_text())

    def begin(self, speculation: str | None) -> None:
        """Nothing is learned from prompts."""

    def run(self, prompts: list[list[int]], max_tokens: int, speculation: str | None) -> Answer:
        clock = Clock()
        results = self.generator.generate_batch(
            [[self.vocabulary[token] for token in prompt] for prompt in prompts],
            max_length=max_tokens,
            end_token=[],
            include_prompt_in_result=False,
        )
        tokens = [result.sequences_ids[0] for result in results]
        return Answer(tokens, clock())

    def logits(self, prompt: list[int]) -> np.ndarray:
        found = self.generator.forward_batch([[self.vocabulary[token] for token in prompt]])
        return np.array(found.to(ctranslate2.DataType.float32))[0]


def convert(source: Path, target: Path, precision: str) -> None:
    TransformersConverter(str(source)).convert(str(target), quantization=precision, force=True)


def load(settings: Settings) -> Worker:
    return CTranslate2(settings)
