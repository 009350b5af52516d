"""OpenAI's API of responses, without what needs a memory on the server."""

from __future__ import annotations

import time
import uuid
from typing import Any

from pydantic import Field

from hasten.engine.request import Progress
from hasten.llm import LLM
from hasten.serve.answers import Answer, Event, Groups, figures, usage
from hasten.serve.bodies import Asking, Body, ChatBody, JsonSchema, ResponseFormat
from hasten.serve.errors import ApiError
from hasten.serve.messages import text_of_parts


class TextFormat(Body):
    """`text.format`: as `response_format`, on one level."""

    type: str = "text"
    name: str = "schema"
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """`text`."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesBody(Asking):
    """/v1/responses."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    top_logprobs: int | None = None
    stream_options: dict[str, Any] | None = None
    text: TextOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = None
    include: list[str] | None = None
    reasoning: dict[str, Any] | None = None
    truncation: str | None = None

    def chat(self) -> ChatBody:
        """The same as a conversation.

        Raises:
            ApiError: what is not done.
        """
        for name in ("previous_response_id", "conversation", "background", "include"):
            if getattr(self, name):
                raise ApiError(400, f"{name}: this server keeps nothing between requests", name)
        if self.top_logprobs:
            raise ApiError(400, "top_logprobs are told by /v1/chat/completions", "top_logprobs")
        if self.truncation not in (None, "disabled"):
            raise ApiError(400, "truncation is not done", "truncation")
        return ChatBody(
            model=self.model,
            messages=self._messages(),
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stream=self.stream,
            response_format=self._format(),
            tools=self.tools,
            tool_choice=self.tool_choice,
            method=self.method,
        )

    def _messages(self) -> list[dict[str, Any]]:
        given = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        messages = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        for item in given:
            if item.get("type", "message") != "message" or "role" not in item:
                raise ApiError(400, "input must be text, or messages", "input")
            role = "system" if item["role"] == "developer" else item["role"]
            messages.append({"role": role, "content": text_of_parts(item.get("content"))})
        if not messages:
            raise ApiError(400, "input is empty", "input")
        return messages

    def _format(self) -> ResponseFormat | None:
        form = None if self.text is None else self.text.format
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return ResponseFormat(type="json_object")
        if form.type != "json_schema" or form.schema_ is None:
            raise ApiError(400, "text.format must be text, json_object, or json_schema with a schema", "text.format")
        return ResponseFormat(type="json_schema", json_schema=JsonSchema(name=form.name, schema=form.schema_))


class ResponseAnswer(Answer):
    """The answer: one message of one part.

    Args:
        llm: for the text of tokens.
        model: its name for clients.
        body: what was asked for, which an answer repeats.
    """

    def __init__(self, llm: LLM, model: str, body: ResponsesBody) -> None:
        self.llm, self.model, self.body = llm, model, body
        self.id, self.message = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self.created, self._number = int(time.time()), -1

    def whole(self, groups: Groups) -> dict[str, Any]:
        job = groups[0][0]
        cut = job.finish_reason == "length"
        counted = usage(groups)
        return {
            **self._frame("incomplete" if cut else "completed", [self._item(groups)]),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": counted["prompt_tokens"],
                "input_tokens_details": counted["prompt_tokens_details"],
                "output_tokens": counted["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counted["total_tokens"],
            },
            "hasten": figures(groups),
        }

    def opened(self, groups: Groups) -> list[Event]:
        begun = self._frame("in_progress", [])
        item = {"type": "message", "id": self.message, "status": "in_progress", "role": "assistant", "content": []}
        return [
            self._event("response.created", response=begun),
            self._event("response.in_progress", response=begun),
            self._event("response.output_item.added", output_index=0, item=item),
            self._event("response.content_part.added", **self._place, part=self._part("")),
        ]

    def news(self, groups: Groups, number: int, step: Progress) -> list[Event]:
        if not step.text:
            return []
        return [self._event("response.output_text.delta", **self._place, delta=step.text, logprobs=[])]

    def closed(self, groups: Groups) -> list[Event]:
        text, response = self.llm.text_of(groups[0][0]), self.whole(groups)
        return [
            self._event("response.output_text.done", **self._place, text=text, logprobs=[]),
            self._event("response.content_part.done", **self._place, part=self._part(text)),
            self._event("response.output_item.done", output_index=0, item=self._item(groups)),
            self._event(f"response.{response['status']}", response=response),
        ]

    def failed(self, error: ApiError) -> list[Event]:
        document = error.document["error"]
        return [self._event("error", message=document["message"], code=document["code"], param=document["param"])]

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.message, "output_index": 0, "content_index": 0}

    def _event(self, name: str, **document: Any) -> Event:
        self._number += 1
        return Event({"type": name, "sequence_number": self._number, **document}, name)

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _item(self, groups: Groups) -> dict[str, Any]:
        job = groups[0][0]
        return {
            "type": "message",
            "id": self.message,
            "status": "incomplete" if job.finish_reason == "length" else "completed",
            "role": "assistant",
            "content": [self._part(self.llm.text_of(job))],
        }

    def _frame(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        body = self.body
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.model,
            "output": output,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "tool_choice": "none",
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
        }
