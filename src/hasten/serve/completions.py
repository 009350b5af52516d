"""Answers of /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import time
import uuid
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from hasten.engine import Job, TokenLogprobs
from hasten.engine.request import Progress
from hasten.llm import LLM
from hasten.serve.answers import Answer, Event, Groups, figures, numbered, token_text, usage
from hasten.serve.bodies import Decoding, StreamOptions, TextBody


class Completions(Answer):
    """What both have in common.

    Args:
        llm: for the text of tokens.
        model: its name for clients.
        body: what was asked for.
    """

    kind: str
    prefix: str
    empty = False
    """Whether nothing of the output is asked for."""

    def __init__(self, llm: LLM, model: str, body: Decoding) -> None:
        self.llm, self.model, self.token_ids = llm, model, body.return_token_ids
        self.options = body.stream_options or StreamOptions()
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self._told: dict[int, int] = {}

    @abstractmethod
    def choice(self, job: Job, text: str, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """A whole choice, without its number and end."""

    @abstractmethod
    def piece(self, job: Job, text: str, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """What is new of a choice, without its number and end."""

    @abstractmethod
    def opening(self, job: Job) -> dict[str, Any] | None:
        """What is told of a choice before its first token."""

    def frame(self, choices: list[dict[str, Any]], chunk: bool) -> dict[str, Any]:
        """What stands around choices."""
        kind = f"{self.kind}.chunk" if chunk and self.kind == "chat.completion" else self.kind
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def whole(self, groups: Groups) -> dict[str, Any]:
        choices = []
        for index, job in numbered(groups):
            text = "" if self.empty else self.llm.text_of(job)
            choice = self.choice(job, text, [] if self.empty else job.logprobs)
            if self.token_ids:
                choice["token_ids"] = [] if self.empty else job.output
                choice["prompt_token_ids"] = job.tokens[: job.prompt_length]
            choices.append({"index": index, **choice, "finish_reason": job.finish_reason})
        return {**self.frame(choices, chunk=False), "usage": self.counted(groups), "hasten": figures(groups)}

    def counted(self, groups: Groups) -> dict[str, Any]:
        return usage(groups, self.empty)

    def opened(self, groups: Groups) -> list[Event]:
        events = []
        for index, job in numbered(groups):
            opened = self.opening(job)
            if opened is not None:
                choice = {"index": index, **opened, "finish_reason": None}
                events.append(Event(self.frame([choice], chunk=True)))
        return events

    def news(self, groups: Groups, number: int, step: Progress) -> list[Event]:
        job = groups[number][step.request.choice]
        first = self._told.get(job.id, 0)
        self._told[job.id] = first + len(step.tokens)
        tokens = [] if self.empty else step.tokens
        logprobs = job.logprobs[first : first + len(tokens)]
        text = "" if self.empty else step.text
        if not text and not (tokens and (logprobs or self.token_ids)) and step.finish_reason is None:
            return []
        choice = self.piece(job, text, logprobs)
        if self.token_ids:
            choice["token_ids"] = tokens
            if not first:
                choice["prompt_token_ids"] = job.tokens[: job.prompt_length]
        index = number * len(groups[number]) + job.choice
        event = self.frame([{"index": index, **choice, "finish_reason": step.finish_reason}], chunk=True)
        if self.options.include_usage:
            event["usage"] = self.counted(groups) if self.options.continuous_usage_stats else None
        return [Event(event)]

    def closed(self, groups: Groups) -> list[Event]:
        told = {"usage": self.counted(groups), "hasten": figures(groups)}
        last = [Event({**self.frame([], chunk=True), **told})] if self.options.include_usage else []
        return [*last, Event(None)]


class ChatAnswer(Completions):
    """Of /v1/chat/completions."""

    kind, prefix = "chat.completion", "chatcmpl"

    def choice(self, job: Job, text: str, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(job, logprobs)}

    def piece(self, job: Job, text: str, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}, "logprobs": self._logprobs(job, logprobs)}

    def opening(self, job: Job) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def _logprobs(self, job: Job, items: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if job.params.logprobs is None:
            return None
        return {
            "content": [
                {**self._said(item.token, item.logprob), "top_logprobs": [self._said(*pair) for pair in item.top]}
                for item in items
            ],
            "refusal": None,
        }

    def _said(self, token: int, logprob: float) -> dict[str, Any]:
        text = token_text(self.llm, token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}


class TextAnswer(Completions):
    """Of /v1/completions."""

    kind, prefix = "text_completion", "cmpl"

    def __init__(self, llm: LLM, model: str, body: TextBody) -> None:
        super().__init__(llm, model, body)
        self._echo, self.empty = body.echo, body.max_tokens == 0
        self._offsets: dict[int, int] = {}

    def choice(self, job: Job, text: str, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        if not self._echo:
            return {"text": text, "logprobs": self._logprobs(job, logprobs, 0)}
        prompt = job.tokens[: job.prompt_length]
        items = [*self._of_prompt(job), *logprobs]
        return {"text": self._text(prompt) + text, "logprobs": self._logprobs(job, items, 0, prompt[0])}

    def piece(self, job: Job, text: str, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        start = self._offsets.get(job.id, len(self._text(job.tokens[: job.prompt_length])) if self._echo else 0)
        self._offsets[job.id] = start + len(text)
        return {"text": text, "logprobs": self._logprobs(job, logprobs, start)}

    def opening(self, job: Job) -> dict[str, Any] | None:
        # Its log-probabilities are known with the first token only: they come with the whole answer.
        return {"text": self._text(job.tokens[: job.prompt_length]), "logprobs": None} if self._echo else None

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.llm.tokenizer.decode(list(tokens)))

    def _of_prompt(self, job: Job) -> list[TokenLogprobs]:
        return [item for item in job.prompt_logprobs if item is not None]

    def _logprobs(
        self, job: Job, items: Sequence[TokenLogprobs], start: int, first: int | None = None
    ) -> dict[str, Any] | None:
        """`first`: a token before the others, which nothing predicts."""
        if job.params.logprobs is None:
            return None
        tokens = [token_text(self.llm, item.token) for item in items]
        logprobs: list[float | None] = [item.logprob for item in items]
        top: list[dict[str, float] | None] = [
            {token_text(self.llm, token): logprob for token, logprob in item.top} for item in items
        ]
        if first is not None:
            tokens, logprobs, top = [token_text(self.llm, first), *tokens], [None, *logprobs], [None, *top]
        offsets = []
        for token in tokens:
            offsets.append(start)
            start += len(token)
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}
