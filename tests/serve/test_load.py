"""Many clients, clients that leave, and a server that ends."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from hasten import LLM
from hasten.serve.app import application
from hasten.serve.metrics import Metrics
from hasten.serve.routes import Service
from hasten.serve.worker import Admission, Worker

LONG = {"prompt": "Count: 1 2 3", "max_tokens": 900, "ignore_eos": True, "temperature": 0, "method": "plain"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", ["decoding", "queued", "prompt"])
def test_who_leaves_ends_the_work(serving: Any, stream: bool, place: str) -> None:
    with serving(sequences=1) as server:
        if place == "queued":
            blocker = threading.Thread(target=lambda: server.post("/v1/completions", **{**LONG, "max_tokens": 400}))
            blocker.start()
            while not server.worker.running:
                time.sleep(0.005)
        body = {**LONG, "stream": stream}
        if place == "prompt":
            body["prompt"] = "word " * 800
            body["max_tokens"] = 20

        async def leave() -> None:
            async with httpx.AsyncClient(base_url=server.address) as client:
                asked = asyncio.ensure_future(client.post("/v1/completions", json=body))
                wanted = 2 if place == "queued" else 1
                while server.worker.choices < wanted or not (server.worker.running or server.worker.waiting):
                    await asyncio.sleep(0.002)
                asked.cancel()

        asyncio.run(leave())
        if place == "queued":
            until = time.monotonic() + 10
            while server.worker.choices > 1 and time.monotonic() < until:
                time.sleep(0.01)
            assert server.worker.choices == 1
            blocker.join()
        assert server.empty()
        assert server.llm.engine.cache.used_bytes == 0


def test_a_burst_is_told_to_come_again(serving: Any) -> None:
    with serving(sequences=2, admission=Admission(choices=8)) as server:

        async def burst() -> list[tuple[int, str | None]]:
            limits = httpx.Limits(max_connections=200)
            async with httpx.AsyncClient(base_url=server.address, limits=limits, timeout=120) as client:
                body = {**LONG, "max_tokens": 40}
                answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(300)))
                return [(answer.status_code, answer.headers.get("retry-after")) for answer in answers]

        found = asyncio.run(burst())
        assert {status for status, _ in found} == {200, 429}
        assert sum(status == 200 for status, _ in found) >= 8
        assert all(after is not None for status, after in found if status == 429)
        assert server.empty() and server.llm.engine.cache.used_bytes == 0
        assert server.complete("12 + 45 =", max_tokens=2)["choices"]


def test_tokens_of_prompts_are_limited(serving: Any) -> None:
    with serving(admission=Admission(tokens=50)) as server:
        # Alone it never fits: to come again is no use.
        assert server.post("/v1/completions", prompt="word " * 60, max_tokens=2).status_code == 400
        prompt = [5] * 30
        with server.http.stream("POST", "/v1/completions", json={**LONG, "prompt": prompt, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            answer = server.post("/v1/completions", prompt=prompt, max_tokens=2)
            assert answer.status_code == 429 and answer.headers["retry-after"]
        assert server.empty()
        assert server.complete("12 + 45 =", max_tokens=2)["choices"]


def test_choices_that_never_fit_are_refused(serving: Any) -> None:
    with serving(admission=Admission(choices=3)) as server:
        assert server.post("/v1/completions", prompt="x", n=4, max_tokens=2).status_code == 400
        assert server.empty()


def test_who_leaves_before_a_stream_begins_ends_the_work(offline: LLM) -> None:
    """Too short a moment for a socket: the application is called as a server does."""
    worker = Worker(offline, Admission())
    app = application(Service(worker, Metrics(worker, "tiny"), "tiny", "plain"))
    messages = iter([{"type": "http.request", "body": json.dumps({**LONG, "stream": True}).encode()}])
    begun: list[Any] = []

    async def receive() -> Any:
        message = next(messages, None)
        # It goes when the answer is there, and nothing of it is sent.
        while message is None and not worker.choices:
            await asyncio.sleep(0)
        if message is None and not any(ticket.groups for ticket in worker._tickets.values()):
            await asyncio.Event().wait()
        return message or {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        begun.append(message)
        await asyncio.Event().wait()

    async def ask() -> None:
        worker.start()
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
        await app(scope, receive, send)
        worker.stop()

    asyncio.run(ask())
    assert worker.choices == worker.tokens == 0 and not offline.engine.busy


def test_a_small_cache_makes_progress(serving: Any, offline: Any) -> None:
    from hasten import SamplingParams

    prompts = [f"Copy the list: {' '.join(f'w{number}{k}' for k in range(30))}\nAnswer:" for number in range(6)]
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    expected = [generation.text for generation in offline.generate(prompts, params)]
    with serving(cache_bytes=3 * 2**20) as server, ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(server.complete, prompt, max_tokens=60, ignore_eos=True) for prompt in prompts]
        assert [each.result()["choices"][0]["text"] for each in asked] == expected
        assert server.empty()


def test_what_takes_too_long_is_given_up(serving: Any) -> None:
    with serving(seconds=0.05) as server:
        answer = server.post("/v1/completions", **LONG)
        assert answer.status_code == 408 and answer.json()["error"]["code"] == "timeout"
        with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as stream:
            assert '"code":"timeout"' in "".join(stream.iter_text())
        assert server.empty()


def test_counters_are_the_sum_of_usage(serving: Any) -> None:
    with serving() as server:
        used = [server.complete(f"{number} + 1 =", max_tokens=5)["usage"] for number in range(4)]
        with server.http.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 7, "stream": True}) as stream:
            list(stream.iter_lines())
        text = server.http.get("/metrics").text
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        output = sum(each["completion_tokens"] for each in used) + 7
        for prefix in ("hasten", "vllm"):
            assert float(lines[prefix + ':generation_tokens_total{model_name="tiny"}']) == output
            ended = [
                float(value) for name, value in lines.items() if name.startswith(f"{prefix}:request_success_total")
            ]
            assert sum(ended) == 5
            assert float(lines[prefix + ':num_requests_running{model_name="tiny"}']) == 0
        assert server.http.get("/health").status_code == 200
        assert server.http.get("/ready").json()["status"] == "ready"


def test_health_is_told_beside_a_long_prompt(serving: Any) -> None:
    """No promise of milliseconds here: only that the loop is free while the engine reads."""
    with serving() as server, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.complete, "word " * 900, max_tokens=2, method="plain") for _ in range(8)]
        while not server.worker.running:
            time.sleep(0.002)
        assert server.http.get("/health").status_code == 200
        assert all(each.result()["choices"] for each in asked)
