"""transformers: `generate`, eager, with its own assisted generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from workers.protocol import Answer, Clock, Settings, Worker


class Transformers(Worker):
    """A model, and its assistant if there is one. Prompts of unequal length are padded on the left."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        self.model = self._load(settings.model, settings.precision)
        self.draft = self._load(settings.draft, settings.precision) if settings.draft else None

    def _load(self, folder: str, precision: str) -> Any:
        # Of a GGUF file, whose weights it expands, transformers is told the folder and the name.
        file = {"gguf_file": Path(folder).name} if Path(folder).is_file() else {}
        where = Path(folder).parent if file else folder
        model = AutoModelForCausalLM.from_pretrained(where, **file, dtype=getattr(torch, precision)).eval()
        # Empty, so that nothing of the checkpoint's own (above all its end of text) comes into play.
        model.generation_config = GenerationConfig(pad_token_id=0)
        return model

    def begin(self, speculation: str | None) -> None:
        """Nothing is learned from prompts."""

    def options(self, prompts: list[list[int]], speculation: str | None) -> dict[str, Any]:
        """Further arguments of `generate`."""
        if speculation == "prompt-lookup":
            return {"prompt_lookup_num_tokens": 10}
        return {"assistant_model": self.draft} if speculation == "draft-model" else {}

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], max_tokens: int, speculation: str | None) -> Answer:
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        options = self.options(prompts, speculation)
        clock = Clock()
        output = self.model.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, **options)
        tokens = output[:, width:].tolist()
        return Answer(tokens, clock())

    @torch.inference_mode()
    def logits(self, prompt: list[int]) -> Any:
        return self.model(torch.tensor([prompt])).logits[0].float().numpy()


def load(settings: Settings) -> Worker:
    return Transformers(settings)
