"""A server on a free port, in this process, and clients of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from hasten import LLM
from hasten.engine import Limits
from hasten.serve.app import application
from hasten.serve.metrics import Metrics
from hasten.serve.routes import Service
from hasten.serve.worker import Admission, Worker

ADMISSION = Admission()


@dataclass
class Running:
    """A server that runs.

    Attributes:
        http: a client of it.
        openai: the same, as OpenAI's library.
    """

    worker: Worker
    address: str
    http: httpx.Client
    openai: openai.OpenAI

    @property
    def llm(self) -> LLM:
        return self.worker.llm

    def post(self, route: str, **body: Any) -> httpx.Response:
        return self.http.post(route, json=body)

    def complete(self, prompt: Any, **body: Any) -> dict[str, Any]:
        """/v1/completions, greedy unless told otherwise."""
        answer = self.post("/v1/completions", **{"prompt": prompt, "temperature": 0, **body})
        assert answer.status_code == 200, answer.text
        document: dict[str, Any] = answer.json()
        return document

    def empty(self, seconds: float = 10.0) -> bool:
        """Whether nothing is decoded any more, within so many seconds."""
        until = time.monotonic() + seconds
        while self.llm.engine.busy or self.worker.choices or self.worker.tokens:
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        return True


@contextmanager
def running(
    llm: LLM, admission: Admission = ADMISSION, keys: tuple[str, ...] = (), **settings: Any
) -> Iterator[Running]:
    """A server of a model."""
    worker = Worker(llm, admission)
    of_app = {name: settings.pop(name) for name in ("origins", "body_bytes") if name in settings}
    service = Service(worker, Metrics(worker, "tiny"), "tiny", "ngram", **settings)
    app = application(service, keys, **of_app)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    key = keys[0] if keys else "none"
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)
    http = httpx.Client(base_url=address, headers={"Authorization": f"Bearer {key}"}, timeout=60)
    try:
        yield Running(worker, address, http, client)
    finally:
        http.close()
        client.close()
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="session")
def llm() -> LLM:
    """Nobody but the server drives it."""
    return LLM("tiny", prefix_bytes=2**22)


@pytest.fixture(scope="session")
def offline() -> LLM:
    """The same model, asked without a server."""
    return LLM("tiny")


@pytest.fixture(scope="session")
def server(llm: LLM) -> Iterator[Running]:
    with running(llm) as found:
        yield found


@pytest.fixture
def serving() -> Callable[..., Any]:
    """serving(...): a server of its own, with limits, keys and the like."""

    def make(cache_bytes: int | None = None, sequences: int = 32, **settings: Any) -> Any:
        return running(LLM("tiny", cache_bytes=cache_bytes, limits=Limits(sequences=sequences)), **settings)

    return make
