"""What the server answers, whole or as a stream of events."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from hasten.engine import Job, TokenLogprobs
from hasten.engine.request import Progress
from hasten.llm import LLM


class Answer(ABC):
    """One answer in the making.

    Args:
        llm: for the text of tokens.
        model: its name for clients.
        token_ids: whether choices tell theirs.
    """

    kind: str
    prefix: str

    def __init__(self, llm: LLM, model: str, token_ids: bool) -> None:
        self.llm, self.model, self.token_ids = llm, model, token_ids
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self._told: dict[tuple[int, int], int] = {}

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

    def whole(self, groups: Sequence[Sequence[Job]], empty: bool) -> dict[str, Any]:
        """The answer at its end.

        Args:
            empty: nothing of the output is asked for.
        """
        choices = []
        for number, group in enumerate(groups):
            for job in group:
                text = "" if empty else self.llm.text_of(job)
                choice = self.choice(job, text, [] if empty else job.logprobs)
                if self.token_ids:
                    choice |= {
                        "token_ids": [] if empty else job.output,
                        "prompt_token_ids": job.tokens[: job.prompt_length],
                    }
                index = number * len(group) + job.choice
                choices.append({"index": index, **choice, "finish_reason": finish(job.finish_reason)})
        return {**self.frame(choices, chunk=False), "usage": usage(groups, empty), "hasten": figures(groups)}

    def openings(self, groups: Sequence[Sequence[Job]]) -> list[dict[str, Any]]:
        """The first events of a stream."""
        events = []
        for number, group in enumerate(groups):
            for job in group:
                opened = self.opening(job)
                if opened is not None:
                    choice = {"index": number * len(group) + job.choice, **opened, "finish_reason": None}
                    events.append(self.frame([choice], chunk=True))
        return events

    def event(self, number: int, size: int, step: Progress, empty: bool) -> dict[str, Any] | None:
        """What a step gave, as an event; None where it shows nothing.

        Args:
            number, size: of the prompt, and how many choices each prompt has.
        """
        job: Any = step.request
        key = number, job.choice
        first = self._told.get(key, 0)
        self._told[key] = first + len(step.tokens)
        logprobs = job.logprobs[first : first + len(step.tokens)]
        tokens = [] if empty else step.tokens
        text = "" if empty else step.text
        if not text and not (tokens and (logprobs or self.token_ids)) and step.finish_reason is None:
            return None
        choice = self.piece(job, text, [] if empty else logprobs)
        if self.token_ids:
            choice["token_ids"] = tokens
            if not first:
                choice["prompt_token_ids"] = job.tokens[: job.prompt_length]
        reason = None if step.finish_reason is None else finish(step.finish_reason)
        return self.frame([{"index": number * size + job.choice, **choice, "finish_reason": reason}], chunk=True)


class ChatAnswer(Answer):
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


class TextAnswer(Answer):
    """Of /v1/completions.

    Args:
        echo: whether the prompt, and where asked for its log-probabilities, stand before the output.
    """

    kind, prefix = "text_completion", "cmpl"

    def __init__(self, llm: LLM, model: str, token_ids: bool, echo: bool) -> None:
        super().__init__(llm, model, token_ids)
        self._echo = echo
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


def token_text(llm: LLM, token: int) -> str:
    """A token by itself, special ones, too."""
    return str(llm.tokenizer.decode([token]))


def finish(reason: str | None) -> str:
    """As clients know it."""
    return reason or "stop"


def usage(groups: Sequence[Sequence[Job]], empty: bool = False) -> dict[str, Any]:
    """Tokens; a prompt counts once for all its choices."""
    prompt = sum(group[0].prompt_length for group in groups)
    output = 0 if empty else sum(len(job.output) for group in groups for job in group)
    cached = sum(group[0].statistics.recalled_rows for group in groups)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def figures(groups: Sequence[Sequence[Job]]) -> dict[str, Any]:
    """What clients of other servers leave alone: the method, and what it gave."""
    jobs = [job for group in groups for job in group]
    steps, tokens = sum(job.statistics.steps for job in jobs), sum(job.statistics.tokens for job in jobs)
    return {
        "method": jobs[0].method,
        "steps": steps,
        "tokens_per_step": round(tokens / steps, 4) if steps else 0.0,
        "proposed": sum(job.statistics.proposed for job in jobs),
        "accepted": sum(job.statistics.accepted for job in jobs),
    }
