"""The routes of OpenAI's API, and vLLM's beside them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from hasten.serve.answers import Answer, Event, token_text
from hasten.serve.bodies import ChatBody, Decoding, DetokenizeBody, TextBody, TokenizeBody
from hasten.serve.completions import ChatAnswer, TextAnswer
from hasten.serve.errors import ApiError, as_api_error
from hasten.serve.messages import CountBody, Message, MessagesBody
from hasten.serve.metrics import Metrics
from hasten.serve.responses import ResponseAnswer, ResponsesBody
from hasten.serve.worker import Asked, Ticket, Worker

log = logging.getLogger("hasten.serve")

Result = TypeVar("Result")
KEEP_ALIVE = 15.0
"""Seconds without a token after which a stream says that it is alive."""


@dataclass(frozen=True)
class Service:
    """What routes need.

    Attributes:
        model: its name for clients.
        method: requests are decoded with, unless they say otherwise.
        choices: a request may ask for, over all its prompts.
        seconds: that a request may take.
    """

    worker: Worker
    metrics: Metrics
    model: str
    method: str
    choices: int = 64
    seconds: float = 600.0
    started: int = 0

    def named(self, model: str | None) -> None:
        """Refuse another model.

        Raises:
            ApiError: it is not here.
        """
        if model is not None and model != self.model:
            raise ApiError(
                404, f"the model {model!r} is not here, {self.model!r} is", param="model", code="model_not_found"
            )


def routes(service: Service) -> APIRouter:
    """All of them."""
    router, worker, llm = APIRouter(), service.worker, service.worker.llm

    async def converse(body: ChatBody, answer: Answer, request: Request) -> Response:
        service.named(body.model)
        body.refuse()

        def make() -> Asked:
            params = body.params(llm, tenant_of(request))
            return Asked([llm.apply_chat_template(body.messages)], params, body.specification(service.method))

        return await _answer(service, request, body, answer, make, 1)

    @router.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatBody) -> Response:
        return await converse(body, ChatAnswer(llm, service.model, body), request)

    @router.post("/v1/completions")
    async def complete(request: Request, body: TextBody) -> Response:
        service.named(body.model)
        body.refuse()

        def make() -> Asked:
            params = body.params(llm, tenant_of(request))
            return Asked([llm.encode(each) for each in body.prompts], params, body.specification(service.method))

        answer = TextAnswer(llm, service.model, body)
        return await _answer(service, request, body, answer, make, len(body.prompts))

    @router.post("/v1/messages")
    async def messages(request: Request, body: MessagesBody) -> Response:
        return await converse(body.chat(), Message(llm, service.model), request)

    @router.post("/v1/messages/count_tokens")
    async def count(body: CountBody) -> dict[str, int]:
        service.named(body.model)
        return {"input_tokens": len(await asyncio.to_thread(llm.apply_chat_template, body.conversation()))}

    @router.post("/v1/responses")
    async def responses(request: Request, body: ResponsesBody) -> Response:
        return await converse(body.chat(), ResponseAnswer(llm, service.model, body), request)

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.named(name)
        return _model(service)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        service.named(body.model)

        def ids() -> list[int]:
            if body.messages is not None:
                return llm.apply_chat_template(body.messages)
            assert body.prompt is not None
            return llm.tokenize(body.prompt, body.add_special_tokens)

        tokens = await asyncio.to_thread(ids)
        told = {"count": len(tokens), "max_model_len": llm.model.config.max_positions, "tokens": tokens}
        return told | ({"token_strs": [token_text(llm, each) for each in tokens]} if body.return_token_strs else {})

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        service.named(body.model)
        outside = next((each for each in body.tokens if not 0 <= each < llm.model.config.vocab_size), None)
        if outside is not None:
            raise ApiError(400, f"token id {outside} is outside the vocabulary", "tokens")
        return {"prompt": str(llm.tokenizer.decode(body.tokens))}

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        tokenizer = llm.tokenizer
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": llm.model.config.vocab_size,
            "eos_token": getattr(tokenizer, "eos_token", None),
            "bos_token": getattr(tokenizer, "bos_token", None),
            "chat_template": getattr(tokenizer, "chat_template", None),
        }

    @router.get("/health")
    async def health() -> Response:
        return PlainTextResponse("")

    @router.get("/ready")
    async def ready() -> dict[str, Any]:
        return {"status": "ready", "model": service.model, "running": worker.running, "waiting": worker.waiting}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def tenant_of(request: Request) -> str:
    """Who shares what drafters and the prefix cache have learned: those of one key."""
    return str(getattr(request.state, "tenant", ""))


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": service.started,
        "owned_by": "hasten",
        "max_model_len": service.worker.llm.model.config.max_positions,
    }


async def _answer(
    service: Service, request: Request, body: Decoding, answer: Answer, make: Callable[[], Asked], prompts: int
) -> Response:
    """Let a request in, and answer it whole or as a stream."""
    choices = prompts * body.choices
    if not 1 <= choices <= service.choices:
        raise ApiError(400, f"between 1 and {service.choices} choices over all prompts, not {choices}", "n")
    ticket = await _unless_gone(request, service.worker.submit(make, choices, body.constrained))
    if body.stream:
        return Stream(service, ticket, answer)
    try:
        await _unless_gone(request, _finished(service, ticket))
        return JSONResponse(answer.whole(ticket.groups))
    finally:
        _end(service, ticket, answer)


def _end(service: Service, ticket: Ticket, answer: Answer) -> None:
    """Give back what an answer held, and count it."""
    ticket.close()
    service.metrics.ended(ticket.groups, answer.counted(ticket.groups))


class Stream(StreamingResponse):
    """An answer as events. It ends what it has begun, even where the client goes before the first one is made."""

    def __init__(self, service: Service, ticket: Ticket, answer: Answer) -> None:
        events = _stream(service, ticket, answer)
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._served = service, ticket, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _end(*self._served)


async def _finished(service: Service, ticket: Ticket) -> None:
    try:
        async with asyncio.timeout(service.seconds):
            async for _ in ticket.progress(KEEP_ALIVE):
                pass
    except TimeoutError:
        raise _late(service) from None


def _late(service: Service) -> ApiError:
    return ApiError(408, f"the answer was not complete in {service.seconds:g} s", code="timeout")


async def _stream(service: Service, ticket: Ticket, answer: Answer) -> AsyncIterator[bytes]:
    """The events of an answer; `Stream` ends it."""
    until, groups = time.monotonic() + service.seconds, ticket.groups
    try:
        for event in answer.opened(groups):
            yield _line(event)
        async for news in ticket.progress(KEEP_ALIVE):
            if time.monotonic() > until:
                raise _late(service)
            if news is None:
                yield b": alive\n\n"
                continue
            for event in answer.news(groups, *news):
                yield _line(event)
        last = answer.closed(groups)
    except Exception as error:
        failed = as_api_error(error)
        if failed.status == 500:
            log.error("a stream failed", exc_info=error)
        service.metrics.failed(failed.status)
        last = answer.failed(failed)
    for event in last:
        yield _line(event)


def _line(event: Event) -> bytes:
    """An event as a stream has it."""
    if event.document is None:
        return b"data: [DONE]\n\n"
    name = b"" if event.name is None else b"event: " + event.name.encode() + b"\n"
    return name + b"data: " + msgspec.json.encode(event.document) + b"\n\n"


class Gone(Exception):
    """The client is not there any more."""


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Do something, unless the client goes before it is done.

    Raises:
        Gone: it has.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
