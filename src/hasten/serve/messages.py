"""Anthropic's API of messages."""

from __future__ import annotations

import uuid
from typing import Any

from pydantic import Field

from hasten.engine import Job
from hasten.engine.request import Progress
from hasten.engine.text import decode
from hasten.llm import LLM
from hasten.serve.answers import Answer, Event, Groups, figures, usage
from hasten.serve.bodies import Body, ChatBody
from hasten.serve.errors import ApiError

TEXTS = {"text", "input_text", "output_text"}
"""Types of parts that are text, whichever API they are of."""


class CountBody(Body):
    """/v1/messages/count_tokens."""

    model: str | None = None
    messages: list[dict[str, Any]] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None

    def conversation(self) -> list[dict[str, Any]]:
        """As chat templates read it."""
        if self.tools:
            raise ApiError(400, "tools are not there yet: leave them out", "tools")
        if self.thinking is not None and self.thinking.get("type") != "disabled":
            raise ApiError(400, "thinking is not there: leave it out, or disable it", "thinking")
        system = [] if self.system is None else [{"role": "system", "content": text_of_parts(self.system)}]
        return [*system, *({**each, "content": text_of_parts(each.get("content"))} for each in self.messages)]


class MessagesBody(CountBody):
    """/v1/messages; `method` is hasten's own."""

    max_tokens: int = Field(ge=1)
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool = False
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    method: str | None = None

    def chat(self) -> ChatBody:
        """The same in OpenAI's words."""
        return ChatBody(
            model=self.model,
            messages=self.conversation(),
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop_sequences,
            stream=self.stream,
            method=self.method,
        )


class Message(Answer):
    """The answer: one choice, one block of text.

    Args:
        llm: for the text of tokens.
        model: its name for clients.
    """

    def __init__(self, llm: LLM, model: str) -> None:
        self.llm, self.model, self.id = llm, model, f"msg_{uuid.uuid4().hex}"

    def whole(self, groups: Groups) -> dict[str, Any]:
        job = groups[0][0]
        content = [{"type": "text", "text": self.llm.text_of(job)}]
        return {**self._frame(content), **self._end(job), "usage": self._usage(groups), "hasten": figures(groups)}

    def opened(self, groups: Groups) -> list[Event]:
        begun = {**self._frame([]), "stop_reason": None, "stop_sequence": None}
        begun["usage"] = {**self._usage(groups), "output_tokens": 0}
        block = {"type": "text", "text": ""}
        return [
            self._event("message_start", message=begun),
            self._event("content_block_start", index=0, content_block=block),
            self._event("ping"),
        ]

    def news(self, groups: Groups, number: int, step: Progress) -> list[Event]:
        if not step.text:
            return []
        return [self._event("content_block_delta", index=0, delta={"type": "text_delta", "text": step.text})]

    def closed(self, groups: Groups) -> list[Event]:
        return [
            self._event("content_block_stop", index=0),
            self._event("message_delta", delta=self._end(groups[0][0]), usage=self._usage(groups)),
            self._event("message_stop"),
        ]

    def failed(self, error: ApiError) -> list[Event]:
        return [self._event("error", **error.document)]

    def _frame(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content}

    def _event(self, name: str, **document: Any) -> Event:
        return Event({"type": name, **document}, name)

    def _end(self, job: Job) -> dict[str, Any]:
        cut = job.stopper.cut
        if cut is None:
            reason = "max_tokens" if job.finish_reason == "length" else "end_turn"
            return {"stop_reason": reason, "stop_sequence": None}
        rest = decode(self.llm.tokenizer, job.output, job.params.skip_special_tokens)[cut:]
        found = next((stop for stop in job.params.stop if rest.startswith(stop)), None)
        return {"stop_reason": "stop_sequence", "stop_sequence": found}

    def _usage(self, groups: Groups) -> dict[str, Any]:
        counted = usage(groups)
        cached = counted["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": counted["prompt_tokens"] - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": counted["completion_tokens"],
        }


def text_of_parts(content: Any) -> str:
    """Text, or the parts of it.

    Raises:
        ApiError: something else than text.
    """
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in content if isinstance(content, list) else [None]:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") in TEXTS else None
        if not isinstance(text, str):
            raise ApiError(400, "the content of a message must be text, or parts of type text", "messages")
        texts.append(text)
    return "".join(texts)
