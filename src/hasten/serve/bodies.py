"""What clients send: OpenAI's fields, some of vLLM's, and what of it hasten refuses by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hasten.engine import Constraint, SamplingParams
from hasten.errors import UserError
from hasten.llm import LLM
from hasten.serve.errors import ApiError

DEEPEST = 32
"""Levels of a JSON schema."""
STRINGS, CHARACTERS = 64, 1024
"""How many strings may end a text or be banned, and how long each may be: all are looked for in every step."""
WORDS = {"cache", "construction", "occurrence", "order", "rule", "search", "site"}
"""Parameters of methods that clients may give as words; others of these name files, models, or work without bounds."""


class Body(BaseModel):
    """Fields that are not here would be ignored in silence: they are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class StreamOptions(Body):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(Body):
    """`response_format.json_schema`."""

    name: str = "schema"
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is given if and only if type is json_schema")
        return self


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`: one of them."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None
    json_object: bool = False


class Asking(Body):
    """What all of OpenAI's ways to ask have in common.

    `method` is hasten's own: a specification of `hasten methods`. Fields that change no token are taken and left alone.
    """

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool = False
    method: str | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class Decoding(Asking):
    """What /v1/chat/completions and /v1/completions have in common."""

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    bad_words: list[str] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool = False
    priority: int | None = None

    @property
    def choices(self) -> int:
        """Of each prompt."""
        return self.n or 1

    @property
    def constrained(self) -> bool:
        """Whether there is something to compile."""
        shaped = self.response_format is not None and self.response_format.type != "text"
        return shaped or self.structured_outputs is not None

    def limit(self) -> int | None:
        """New tokens at most, as the client says."""
        raise NotImplementedError

    def reported(self) -> int | None:
        """How many likeliest tokens to report at each position; None for none."""
        raise NotImplementedError

    def params(self, llm: LLM, tenant: str) -> SamplingParams:
        """Sampling parameters: what is not given is as the checkpoint asks; if that asks for nothing, temperature is 1.

        Raises:
            UserError, ApiError: values that cannot be.
        """
        defaults = llm.default_params
        given = {
            name: value
            for name in (
                *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
                *("frequency_penalty", "seed", "n", "min_tokens"),
            )
            if (value := getattr(self, name)) is not None
        }
        if defaults.greedy:
            given.setdefault("temperature", 1.0)
        limit = self.limit()
        if limit is not None:
            given["max_tokens"] = max(1, limit)
        if self.stop is not None:
            given["stop"] = _few("stop", [self.stop] if isinstance(self.stop, str) else self.stop)
        if self.logit_bias is not None:
            given["logit_bias"] = {**defaults.logit_bias, **self.logit_bias}
        return replace(
            defaults,
            **given,
            stop_token_ids=(*defaults.stop_token_ids, *(self.stop_token_ids or ())),
            bad_words=(*defaults.bad_words, *_few("bad_words", self.bad_words or ())),
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=self.reported(),
            constraint=self._constraint(),
            tenant=tenant,
        )

    def _constraint(self) -> Constraint | None:
        form, shape = self.response_format, self.structured_outputs
        if form is not None and form.type != "text":
            if shape is not None:
                raise ApiError(400, "response_format and structured_outputs exclude each other", "structured_outputs")
            if form.json_schema is None:
                return Constraint(json_object=True)
            return Constraint(_shallow(form.json_schema.schema_, "response_format"))
        if shape is None:
            return None
        if shape.choice is not None:
            if not shape.choice or any((shape.json_, shape.regex, shape.grammar, shape.json_object)):
                raise ApiError(400, "structured_outputs: give one constraint, and a choice of something", "choice")
            return Constraint(json_schema=None, regex="|".join(map(_literally, shape.choice)))
        schema = shape.json_ if shape.json_ is None or isinstance(shape.json_, str) else _shallow(shape.json_, "json")
        return Constraint(schema, shape.regex, shape.grammar, shape.json_object)

    def specification(self, default: str) -> str:
        """The method to decode with.

        Raises:
            ApiError: one by which the client would have the server open a file.
        """
        if self.method is None or self.method == default:
            return default
        for part in filter(None, re.split("[:,+]", self.method)):
            name, _, value = part.partition("=")
            if value and name.strip() not in WORDS and not _is_plain(value.strip()):
                raise ApiError(400, f"method: {name.strip()} is for the server to say, as a file or model is", "method")
        return self.method


class ChatBody(Decoding):
    """/v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=100)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None

    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def reported(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def refuse(self) -> None:
        """Say what is not done.

        Raises:
            ApiError: tools.
        """
        if self.tools and self.tool_choice != "none":
            raise ApiError(400, "tools are not there yet: leave them out, or set tool_choice to none", "tools")


Prompt = str | list[int] | list[str] | list[list[int]]


class TextBody(Decoding):
    """/v1/completions. `max_tokens` 0 with `echo` tells log-probabilities of the prompt."""

    prompt: Prompt
    max_tokens: int | None = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=100)
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None

    def limit(self) -> int | None:
        return self.max_tokens

    def reported(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[Any]:
        """One or several, each text or token ids."""
        many = isinstance(self.prompt, list) and not (self.prompt and isinstance(self.prompt[0], int))
        return list(self.prompt) if many else [self.prompt]

    def params(self, llm: LLM, tenant: str) -> SamplingParams:
        params = super().params(llm, tenant)
        return replace(params, prompt_logprobs=self.logprobs) if self.echo else params

    def refuse(self) -> None:
        """Say what is not done.

        Raises:
            ApiError: a suffix, the best of several.
        """
        if self.suffix:
            raise ApiError(400, "suffix is not done: nothing is filled in between two texts", "suffix")
        if self.best_of is not None and self.best_of != self.choices:
            raise ApiError(400, "best_of is not done beyond n", "best_of")
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens must be at least 1 without echo", "max_tokens")


class TokenizeBody(Body):
    """/tokenize: a text, or messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages")
        return self


class DetokenizeBody(Body):
    """/detokenize."""

    model: str | None = None
    tokens: list[int]


def _is_plain(value: str) -> bool:
    """Whether it is a number, or says yes or no."""
    try:
        float(value)
    except ValueError:
        return value.lower() in ("true", "false")
    return True


def _few(param: str, strings: Sequence[str]) -> tuple[str, ...]:
    """Strings that can be looked for in every step.

    Raises:
        ApiError: too many, or one that is too long.
    """
    if len(strings) > STRINGS or any(len(each) > CHARACTERS for each in strings):
        raise ApiError(400, f"{param} takes {STRINGS} strings of {CHARACTERS} characters each at most", param)
    return tuple(strings)


def _literally(text: str) -> str:
    """A regular expression of a text."""
    return "".join(f"\\{each}" if each in r"\.+*?()|[]{}^$#&-~/" else each for each in text)


def _shallow(schema: Mapping[str, Any], param: str) -> Mapping[str, Any]:
    """A schema that is not too deep to be looked at."""
    level: list[Any] = [schema]
    for _ in range(DEEPEST):
        level = [below for each in level for below in _below(each)]
        if not level:
            return schema
    raise UserError(f"{param}: a schema of more than {DEEPEST} levels")


def _below(value: Any) -> list[Any]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [part for part in parts if isinstance(part, (dict, list))]
