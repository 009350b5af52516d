"""The application: routes, who may use them, and errors in one shape."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hasten import __version__
from hasten.errors import UserError
from hasten.serve.errors import ApiError, as_api_error
from hasten.serve.routes import Gone, Service, routes

log = logging.getLogger("hasten.serve")

OPEN = {"/health", "/ready"}
"""What no key is asked for."""


def application(
    service: Service, keys: Sequence[str] = (), origins: Sequence[str] = (), body_bytes: int = 2**23
) -> FastAPI:
    """All of the server but its socket.

    Args:
        keys: one of which a client must have; none: no client needs any.
        origins: of web pages that may ask.
        body_bytes: that a client may send.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.stop()

    # Its pages of documentation would have browsers fetch scripts from elsewhere.
    app = FastAPI(title="hasten", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(routes(service))

    def failed(error: ApiError) -> Response:
        service.metrics.failed(error.status)
        return JSONResponse(error.document, error.status, error.headers)

    @app.exception_handler(ApiError)
    async def of_api(_: Request, error: ApiError) -> Response:
        return failed(error)

    @app.exception_handler(UserError)
    async def of_user(_: Request, error: UserError) -> Response:
        return failed(as_api_error(error))

    @app.exception_handler(RequestValidationError)
    async def of_body(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        what = "is not known" if first["type"] == "extra_forbidden" else first["msg"]
        # Behind a field's name may stand which of its types was tried.
        return failed(ApiError(400, f"{'.'.join(place) or 'the body'}: {what}", place[0] if place else None))

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> Response:
        return failed(ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(Gone)
    async def of_gone(_: Request, error: Gone) -> Response:
        # Nobody reads it.
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def of_all(_: Request, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return failed(as_api_error(error))

    app.add_middleware(Guard, keys=keys, body_bytes=body_bytes)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    return app


class Guard:
    """Refuses those without a key, and bodies that are too large, before anything reads them."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], body_bytes: int) -> None:
        self._app, self._body_bytes = app, body_bytes
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self._keys and scope["path"] not in OPEN:
            given = headers.get("authorization", "").removeprefix("Bearer ").strip() or headers.get("x-api-key", "")
            own = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
            known = [number for number, key in enumerate(self._keys) if hmac.compare_digest(own, key)]
            if not known:
                error = ApiError(401, "this server asks for a key", code="invalid_api_key")
                await JSONResponse(error.document, 401)(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = f"key {known[0]}"
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._body_bytes:
            await self._too_large()(scope, receive, send)
            return
        read = 0
        begun = False

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._body_bytes:
                raise HTTPException(413, self._message())
            return message

        async def sent(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, counted, sent)
        except HTTPException:
            if begun:
                raise
            await self._too_large()(scope, receive, send)

    def _message(self) -> str:
        return f"a body of more than {self._body_bytes} bytes"

    def _too_large(self) -> Response:
        document: dict[str, Any] = ApiError(413, self._message(), code="too_large").document
        return JSONResponse(document, 413)
