"""What a user holds: load a model, choose a method, generate."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from hasten import generation_config, inputs
from hasten.engine import Drafter, Engine, Job, Limits, Request, SamplingParams, Statistics, TokenLogprobs
from hasten.engine.memory import parse_bytes
from hasten.engine.prompt import Segment
from hasten.engine.sampling.values import shown, text
from hasten.engine.text import decode
from hasten.engine.turn import Driver
from hasten.errors import Notice, UserError
from hasten.inputs import Ids
from hasten.model import Decoder, load_model
from hasten.model.checkpoint import read_json, resolve
from hasten.model.tokenizer import load_tokenizer, render_chat, with_text
from hasten.model.weights import Transform

Prompt = str | Sequence[Segment]
"""What is said of a prompt here; `hasten.inputs` takes more."""


@dataclass(frozen=True)
class Completion:
    """One choice of one prompt.

    Attributes:
        text: without special tokens and without the stop string that ended it.
        token_ids: all new tokens, end-of-text included.
        finish_reason: `stop` (end-of-text or stop string), `length` (budget or context), `abort`.
        steps: forward passes that gave tokens.
        seconds: from arrival to the last token.
        logprobs: per token, where asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    steps: int
    seconds: float
    statistics: Statistics
    logprobs: list[TokenLogprobs]

    @property
    def tokens_per_step(self) -> float:
        return self.statistics.tokens_per_step

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Generation:
    """All choices of one prompt; `text` and the like are those of the first.

    `prompt_logprobs`, where asked for, has an entry per prompt token: None for embeddings, and for the first one, which
    nothing predicts.
    """

    prompt_token_ids: list[int]
    choices: list[Completion]
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids


@dataclass(frozen=True)
class Chunk:
    """A step's worth of a streamed completion; the last one has a finish reason and the whole completion."""

    choice: int
    text: str
    token_ids: list[int]
    kinds: list[str]
    finish_reason: str | None
    completion: Completion | None


class LLM:
    """A model ready to decode.

    Many threads may use one: all their requests run in one batch, and each gets the tokens that it would get alone.

    Args:
        model: a checkpoint folder, a GGUF file, a hub id, or the name of a model that ships (`tiny`).
        method: default method specification, such as `ngram` or `draft-model:length=4`.
        dtype: `auto`, `float32`, `bfloat16`, `float16`, `float64`.
        device: `auto`, `cpu`, `cuda`, ...
        limits: of batch and step.
        backend: what runs the forward pass: `torch`, `native` (float32 and bfloat16 on CPU), `cuda`, or `auto`.
        weights: `dense`, or rounded to `int8` or `int4` as they are loaded (native only).
        numerics: `invariant` for rows whose results never depend on the rows beside them, also on a GPU.
        cache_bytes: limit of the KV cache, in bytes or as text (`2GiB`); by default the environment variable
            `HASTEN_CACHE_BYTES`, and without it none. Where it is full, younger requests wait, and are read again.
        prefix_bytes: of it, what finished texts may keep, so that a prompt that goes on from one of them (the next turn
            of a conversation) is read from there on only; by default `HASTEN_PREFIX_BYTES`, and without it nothing.
        transforms: what is made of the model's weights before they are stored (`hasten.model.weights.Transform`): its
            tokens are then those of the transformed model.

    Attributes:
        folder: the checkpoint's, or its GGUF file.

    Raises:
        UserError: anything wrong with checkpoint, tokenizer or method, in one sentence.
    """

    def __init__(
        self,
        model: str | Path = "tiny",
        method: str | Drafter = "plain",
        dtype: str = "auto",
        device: str = "auto",
        limits: Limits | None = None,
        backend: str = "auto",
        weights: str = "dense",
        numerics: str = "default",
        cache_bytes: int | str | None = None,
        prefix_bytes: int | str | None = None,
        transforms: Sequence[Transform] = (),
    ) -> None:
        folder = resolve(model)
        self.folder = folder
        self.model: Decoder = load_model(folder, dtype, device, backend, weights, numerics, transforms)
        self.tokenizer = load_tokenizer(folder)
        self._generation_config = (
            read_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
        )
        strange = generation_config.unhonoured(self._generation_config, self.model.config.max_positions)
        if strange:
            what = "generation_config.json asks for what hasten does not do"
            warnings.warn(f"{what}: {', '.join(strange)}", Notice, stacklevel=2)
        allowed, kept = _bytes("cache_bytes", cache_bytes), _bytes("prefix_bytes", prefix_bytes)
        self.engine = Engine(self.model, self.tokenizer, self._end_ids(), limits, str(folder), allowed, kept or 0)
        self.method = method
        self.engine.drafter(method)
        self._driver = Driver(self.engine.step)
        # A tokenizer may be set up by one call, and does not bear another one meanwhile.
        self._encoding = Lock()

    def _end_ids(self) -> set[int]:
        """End-of-text ids: the generation config's, the model's, the tokenizer's and the architecture's.

        Text that is a token of the tokenizer stands for its id.

        Raises:
            UserError: what is named is nothing that the vocabulary has, so that no text would ever end.
        """
        config = self.model.config
        named: list[Any] = []
        for ids in (self._generation_config.get("eos_token_id"), config.source.get("eos_token_id")):
            named += ids if isinstance(ids, list) else [ids]
        named = [end for end in (*named, self.tokenizer.eos_token_id, *config.end_ids) if end is not None]
        known = self.tokenizer.get_vocab()
        ids = [known.get(end) if isinstance(end, str) else end for end in named]
        usable = [type(end) is int and 0 <= end < config.vocab_size for end in ids]
        strange = list(dict.fromkeys(repr(end) for end, good in zip(named, usable, strict=True) if not good))
        if strange:
            what = f"{self.folder} names {', '.join(strange)} as end of text, which the vocabulary does not have"
            if not any(usable):
                raise UserError(f"{what}: no text would ever end")
            warnings.warn(what, Notice, stacklevel=3)
        return {end for end, good in zip(ids, usable, strict=True) if good}

    @property
    def default_params(self) -> SamplingParams:
        """As the checkpoint's generation config asks: greedy unless it says `do_sample`.

        Raises:
            UserError: it asks for what cannot be.
        """
        return generation_config.asked(self._generation_config, self.model.config.vocab_size)

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a prompt: text by the tokenizer (special tokens as it adds them), ids as they are.

        Raises:
            UserError: it is no single prompt (`hasten.inputs.prompts`).
        """
        return list(self._one(prompt))  # type: ignore[arg-type]  # embeddings are not asked for here

    def tokenize(self, given: str, special: bool = True) -> list[int]:
        """Token ids of a text; `special`: with those that the tokenizer adds.

        Raises:
            UserError: it is no Unicode text.
        """
        given = text("the text", given)
        with self._encoding:
            ids: list[int] = self.tokenizer(given, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def _prompts(self, given: Any) -> list[Ids]:
        return inputs.prompts(given, self.tokenize, self.apply_chat_template)

    def _one(self, given: Any) -> Ids:
        found = self._prompts(given)
        # A list without anything is an empty prompt here.
        if len(found) > 1:
            raise UserError(f"give one prompt, not {len(found)}")
        return found[0] if found else []

    @property
    def templated(self) -> bool:
        """Whether the checkpoint has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn.

        Raises:
            UserError: these are no messages, the checkpoint has no chat template, the template refuses them or comes to
                no end, or they hold something else than text.
        """
        conversation = [with_text(message) for message in inputs.messages(messages)]
        if not self.templated:
            raise UserError(f"{self.folder} has no chat template: give a plain prompt instead")
        return self.tokenize(render_chat(self.tokenizer, conversation), special=False)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        method: str | Drafter | Sequence[str | Drafter] | None = None,
    ) -> list[Generation]:
        """Complete prompts, all in one batch; parameters and methods may differ per prompt.

        Raises:
            UserError: a prompt that is empty or too long, lists of unequal length, unknown methods.
        """
        many = self._prompts(prompts)
        each_params = [self._params(each) for each in _spread(params, len(many), "params")]
        each_method = [self._method(each) for each in _spread(method, len(many), "method")]
        groups: list[list[Job]] = []
        try:
            for prompt, own_params, own_method in zip(many, each_params, each_method, strict=True):
                groups.append(self.engine.add(prompt, own_params, own_method))
            requests = [request for group in groups for request in group]
            self._driver.until(lambda: all(map(_over, requests)))
        finally:
            # Anything unfinished (bad input, Ctrl-C) gives its memory back.
            for request in (request for group in groups for request in group):
                self.engine.abort(request)
        _check(requests)
        return [
            Generation(
                group[0].tokens[: group[0].prompt_length],
                [self._completion(request) for request in group],
                group[0].prompt_logprobs,
            )
            for group in groups
        ]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, method: str | Drafter | None = None
    ) -> Iterator[Chunk]:
        """Complete one prompt, step by step; closing the iterator ends the request."""
        requests = self.engine.add(self._one(prompt), self._params(params), self._method(method), read=True)
        unread = requests[0].unread
        assert unread is not None
        try:
            while True:
                self._driver.until(lambda: bool(unread) or all(map(_over, requests)))
                if not unread:
                    break
                progress = unread.popleft()
                request = progress.request
                if request.error is not None:
                    raise request.error
                yield Chunk(
                    request.choice,
                    progress.text,
                    progress.tokens,
                    list(progress.kinds),
                    progress.finish_reason,
                    self._completion(request) if progress.finish_reason is not None else None,
                )
        finally:
            for request in requests:
                self.engine.abort(request)
        _check(requests)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        method: str | None = None,
    ) -> Generation:
        """Answer a conversation, by the checkpoint's chat template."""
        return self.generate([self.apply_chat_template(messages)], params, method)[0]

    def _params(self, given: Any) -> SamplingParams:
        """Parameters of one prompt; by default the checkpoint's."""
        if given is None:
            return self.default_params
        if not isinstance(given, SamplingParams):
            raise UserError(f"params must be SamplingParams, not {shown(given)}")
        return given

    def _method(self, given: Any) -> str | Drafter:
        """The method of one prompt; by default the model's."""
        if given is None:
            return self.method
        if not isinstance(given, (str, Drafter)):
            raise UserError(f"method must be a specification or a Drafter, not {shown(given)}")
        return given

    def text_of(self, request: Request) -> str:
        """What a request has said: up to its stop string, and without the token that ended it."""
        spoken = request.output[:-1] if request.stopper.ended_by_token else request.output
        return decode(self.tokenizer, spoken, request.params.skip_special_tokens)[: request.stopper.cut]

    def _completion(self, request: Request) -> Completion:
        return Completion(
            text=self.text_of(request),
            token_ids=request.output,
            finish_reason=request.finish_reason or "abort",
            steps=request.statistics.steps,
            seconds=request.seconds,
            statistics=request.statistics,
            logprobs=request.logprobs,
        )


def _bytes(name: str, given: int | str | None) -> int | None:
    """A size that was given, or that the environment gives as HASTEN_NAME.

    Raises:
        UserError: it is no size.
    """
    size = os.environ.get(f"HASTEN_{name.upper()}") if given is None else given
    return None if size is None else parse_bytes(str(size), name)


def _over(request: Request) -> bool:
    """Whether nothing more comes: its last progress is reported before."""
    return request.finished_at is not None


def _check(requests: Sequence[Request]) -> None:
    """Raise what a request failed with.

    Raises:
        UserError: another thread was interrupted in the middle of a request's step.
    """
    for request in requests:
        if request.error is not None:
            raise request.error
        if request.finish_reason == "abort":
            raise UserError("decoding was interrupted in the middle of a step that another thread took")


def _spread(value: Any, count: int, name: str) -> list[Any]:
    """One value for all prompts, or one per prompt."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise UserError(f"{name} has {len(value)} entries for {count} prompts")
    return list(value)
