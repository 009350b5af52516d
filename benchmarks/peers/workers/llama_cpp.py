"""llama.cpp through the low-level calls of llama-cpp-python, which keep Python's part of a step small.

Prompt lookup drafts by the package's own class. A batch is decoded as several sequences of one context, and starts and
ends together; speculation is for one sequence, as in the package.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding

from workers.llama_gguf import FILE, convert
from workers.protocol import Answer, Clock, Settings, Worker

DRAFTED = 5

__all__ = ["convert", "load"]


class Context:
    """A model with the cache of some sequences of some length.

    Attributes:
        seconds: spent inside llama.cpp so far.
    """

    def __init__(self, model: Any, settings: Settings, sequences: int, length: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = length * sequences
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = settings.threads
        cache = llama_cpp.GGML_TYPE_F32 if settings.precision in ("float32", "bfloat16") else llama_cpp.GGML_TYPE_F16
        params.type_k = params.type_v = cache
        self.handle = llama_cpp.llama_init_from_model(model, params)
        if not self.handle:
            raise RuntimeError("llama.cpp makes no context")
        self.memory = llama_cpp.llama_get_memory(self.handle)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.room = params.n_batch
        self.batch = llama_cpp.llama_batch_init(self.room, 0, 1)
        view = np.ctypeslib.as_array
        self.tokens, self.positions = view(self.batch.token, (self.room,)), view(self.batch.pos, (self.room,))
        self.wanted = view(self.batch.logits, (self.room,))
        view(self.batch.n_seq_id, (self.room,))[:] = 1
        self.seconds = 0.0

    def decode(self, tokens: Any, positions: Any, sequences: Any, wanted: Any) -> np.ndarray:
        """Logits [wanted rows, vocabulary] of what comes behind them; they hold until the next call."""
        count = len(tokens)
        self.batch.n_tokens = count
        self.tokens[:count], self.positions[:count], self.wanted[:count] = tokens, positions, wanted
        for row, sequence in enumerate(sequences):
            self.batch.seq_id[row][0] = sequence
        started = time.perf_counter()
        status = llama_cpp.llama_decode(self.handle, self.batch)
        if status:
            raise RuntimeError(f"llama_decode returns {status}")
        logits = llama_cpp.llama_get_logits(self.handle)
        self.seconds += time.perf_counter() - started
        rows = int(np.count_nonzero(self.wanted[:count]))
        return np.ctypeslib.as_array(logits, (rows, self.vocabulary))

    def read(self, prompts: list[list[int]], every: bool = False) -> np.ndarray:
        """Forget everything, read the prompts, and give the logits behind each, or behind every token."""
        llama_cpp.llama_memory_clear(self.memory, True)
        tokens = np.concatenate([np.array(prompt) for prompt in prompts])
        positions = np.concatenate([np.arange(len(prompt)) for prompt in prompts])
        sequences = [number for number, prompt in enumerate(prompts) for _ in prompt]
        wanted = np.concatenate([(np.arange(len(prompt)) == len(prompt) - 1) | every for prompt in prompts])
        return self.decode(tokens, positions, sequences, wanted)

    def extend(self, tokens: list[int], position: int) -> list[int]:
        """What follows each of some further tokens of sequence 0."""
        positions = np.arange(position, position + len(tokens))
        return self.decode(tokens, positions, [0] * len(tokens), 1).argmax(1).tolist()

    def crop(self, length: int) -> None:
        """Forget what sequence 0 holds behind a length."""
        llama_cpp.llama_memory_seq_rm(self.memory, 0, length, -1)


class SmallModel(LlamaDraftModel):
    """Drafts greedily with a smaller model, whose cache follows the text."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.cached: list[int] = []

    def __call__(self, input_ids: np.ndarray, /, **_: Any) -> np.ndarray:
        text = input_ids.tolist()
        known = 0
        while known < min(len(self.cached), len(text) - 1) and self.cached[known] == text[known]:
            known += 1
        self.context.crop(known)
        drafted = [self.context.extend(text[known:], known)[-1]]
        while len(drafted) < DRAFTED:
            drafted.append(self.context.extend(drafted[-1:], len(text) + len(drafted) - 1)[-1])
        self.cached = text + drafted[:-1]
        return np.array(drafted)


class LlamaCpp(Worker):
    """A model with a context per batch size and length."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        llama_cpp.llama_backend_init()
        self.model = _load(settings.model)
        self.draft = _load(settings.draft) if settings.draft else None
        self.contexts: dict[tuple[int, int], Context] = {}

    def begin(self, speculation: str | None) -> None:
        self.drafter: LlamaDraftModel | None = None
        if speculation == "prompt-lookup":
            self.drafter = LlamaPromptLookupDecoding(max_ngram_size=3, num_pred_tokens=DRAFTED)
        if speculation == "draft-model":
            self.drafter = SmallModel(Context(self.draft, self.settings, 1, self.settings.context))

    def run(self, prompts: list[list[int]], max_tokens: int, speculation: str | None) -> Answer:
        context = self._context(len(prompts), self.settings.room(prompts, max_tokens))
        context.seconds = 0.0
        clock = Clock()
        first = context.read(prompts).argmax(1)
        prefill = clock()
        if self.drafter is None:
            tokens = _together(context, first, [len(prompt) for prompt in prompts], max_tokens)
        else:
            tokens = [_speculate(context, self.drafter, prompts[0], int(first[0]), max_tokens)]
        seconds = clock()
        return Answer(tokens, seconds, prefill, (seconds - context.seconds) / seconds)

    def logits(self, prompt: list[int]) -> np.ndarray:
        return self._context(1, self.settings.room([prompt], 0)).read([prompt], every=True)

    def _context(self, *size: int) -> Context:
        if size not in self.contexts:
            self.contexts[size] = Context(self.model, self.settings, *size)
        return self.contexts[size]


def _together(context: Context, first: np.ndarray, lengths: list[int], max_tokens: int) -> list[list[int]]:
    """All sequences, a token each per step."""
    steps, positions = [first], np.array(lengths)
    for _ in range(max_tokens - 1):
        steps.append(context.decode(steps[-1], positions, range(len(lengths)), 1).argmax(1))
        positions += 1
    return np.stack(steps, 1).tolist()


def _speculate(context: Context, drafter: LlamaDraftModel, prompt: list[int], first: int, max_tokens: int) -> list[int]:
    """One sequence: draft, verify, keep what agrees and one token more."""
    text = [*prompt, first]
    end = len(prompt) + max_tokens
    while len(text) < end:
        draft = drafter(np.array(text))[: end - len(text) - 1].tolist()
        follows = context.extend([text[-1], *draft], len(text) - 1)
        kept = 0
        while kept < len(draft) and draft[kept] == follows[kept]:
            kept += 1
        text += follows[: kept + 1]
        context.crop(len(text) - 1)
    return text[len(prompt) :]


def _load(checkpoint: str) -> Any:
    """A GGUF file, or the one that the conversion left in a folder."""
    file = Path(checkpoint) if Path(checkpoint).is_file() else Path(checkpoint) / FILE
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot read {checkpoint}")
    return model


def load(settings: Settings) -> Worker:
    return LlamaCpp(settings)
