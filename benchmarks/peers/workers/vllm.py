"""vLLM's CPU build: continuous batching; n-gram, suffix and draft-model speculation."""

from __future__ import annotations

import os

# The engine in this process, one thread on each processor that it is pinned to.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

from typing import Any

import numpy as np
from vllm import LLM, SamplingParams

from workers.protocol import Answer, Clock, Settings, Worker


class Vllm(Worker):
    """A model, loaded for the one way to decode that this process is asked for."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.model: LLM | None = None

    def begin(self, speculation: str | None) -> None:
        settings = self.settings
        self.model = self.model or LLM(
            settings.model,
            dtype=settings.precision,
            skip_tokenizer_init=True,
            max_model_len=settings.longest,
            max_num_seqs=settings.batch,
            enable_prefix_caching=False,
            speculative_config=_speculative(speculation, settings.draft),
        )

    def run(self, prompts: list[list[int]], max_tokens: int, speculation: str | None) -> Answer:
        assert self.model
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        clock = Clock()
        results = self.model.generate(asked, params, use_tqdm=False)
        tokens = [list(result.outputs[0].token_ids) for result in results]
        return Answer(tokens, clock())

    def logits(self, prompt: list[int]) -> np.ndarray:
        """The likeliest tokens: a whole row of probabilities comes as one Python object per word."""
        assert self.model
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        [result] = self.model.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        rows = [max(row, key=lambda token: row[token].logprob) for row in result.prompt_logprobs[1:]]
        return np.array([*rows, result.outputs[0].token_ids[0]])


def _speculative(speculation: str | None, draft: str | None) -> dict[str, Any] | None:
    """Suffix decoding goes without its memory of earlier answers: no round could make it forget."""
    return {
        None: None,
        "ngram": {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3, "prompt_lookup_min": 1},
        "suffix": {"method": "suffix", "suffix_decoding_max_cached_requests": 0},
        "draft-model": {"method": "draft_model", "model": draft, "num_speculative_tokens": 5},
    }[speculation]


def load(settings: Settings) -> Worker:
    return Vllm(settings)
