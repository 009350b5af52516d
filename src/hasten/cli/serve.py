"""`hasten serve`: a server for clients of OpenAI's API."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from typing import Annotated

import typer

from hasten.cli import options
from hasten.cli.groups import grouped
from hasten.cli.options import ForDecoding
from hasten.errors import UserError

METHOD = "auto:candidates=suffix"
"""Verifies no more than pays at the load there is. A head would need every prompt read from its beginning."""
NEEDED = ("fastapi", "uvicorn", "msgspec", "prometheus_client")


@grouped
def serve(
    model: options.Model = "tiny",
    method: Annotated[str, typer.Option("--method", help="Of requests that name none.")] = METHOD,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 8000,
    name: Annotated[
        str | None, typer.Option("--served-model-name", help="What clients call the model (default: as given).")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", help="A key that clients must have (several times; default: $HASTEN_API_KEY)."),
    ] = None,
    prefix_bytes: Annotated[
        str, typer.Option("--prefix-bytes", help="What finished texts keep of the cache, for prompts that go on.")
    ] = "256MiB",
    batch: Annotated[int, typer.Option("--batch", help="Choices that are decoded at the same time, at most.")] = 32,
    queue: Annotated[int, typer.Option(help="Choices that are let in, those in the batch included.")] = 256,
    queue_tokens: Annotated[int, typer.Option(help="Tokens of their prompts.")] = 2**20,
    request_seconds: Annotated[float, typer.Option(help="That an answer may take.")] = 600.0,
    prepare_seconds: Annotated[float, typer.Option(help="That a prompt and its schema may take.")] = 10.0,
    max_choices: Annotated[int, typer.Option(help="That a request may ask for, over all its prompts.")] = 64,
    body_bytes: Annotated[str, typer.Option(help="Of a request.")] = "8MiB",
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Of web pages that may ask (several times; default: none).")
    ] = None,
    ssl_certfile: Annotated[str | None, typer.Option(help="Certificate of TLS.")] = None,
    ssl_keyfile: Annotated[str | None, typer.Option(help="Its private key.")] = None,
    loading: ForDecoding = ForDecoding(),
    json: options.Json = False,
) -> None:
    """Serve a model over HTTP, for clients of OpenAI's API.

    SIGTERM and Ctrl-C let nothing new in, finish what has begun, and end.
    """
    missing = [each for each in NEEDED if importlib.util.find_spec(each) is None]
    if missing:
        raise UserError(f"the server needs {', '.join(missing)}: pip install 'hasten[serve]'")
    if not 0 <= port < 2**16:
        raise UserError(f"port must be between 0 and 65535, not {port}")
    for option, value in (
        ("batch", batch), ("queue", queue), ("queue-tokens", queue_tokens), ("request-seconds", request_seconds),
        ("prepare-seconds", prepare_seconds), ("max-choices", max_choices),
    ):  # fmt: skip
        if not value > 0:
            raise UserError(f"{option} must be positive, not {value}")

    if not all(api_key or ["any"]):
        raise UserError("api-key must not be empty: anybody would have it")

    from hasten.engine import Limits
    from hasten.engine.memory import parse_bytes

    body = parse_bytes(body_bytes, "body-bytes")
    llm = loading.load(model, method=method, limits=Limits(sequences=batch), prefix_bytes=prefix_bytes)
    # What it measures once is not for the first client to wait for.
    llm.engine.drafter(method)[1].prepare()

    from hasten.serve.app import application
    from hasten.serve.metrics import Metrics
    from hasten.serve.routes import Service
    from hasten.serve.server import serve as until_told
    from hasten.serve.worker import Admission, Worker

    served = name or str(model)
    worker = Worker(llm, Admission(queue, queue_tokens, prepare_seconds))
    service = Service(worker, Metrics(worker, served), served, method, max_choices, request_seconds, int(time.time()))
    keys = api_key or list(filter(None, [os.environ.get("HASTEN_API_KEY")]))
    app = application(service, keys, cors_origin or (), body)

    def ready(address: str) -> None:
        if json:
            options.emit({"address": address, "model": served, "method": method, "pid": os.getpid()})
        else:
            print(f"{served} with {method} at {address}/v1 (Ctrl-C ends it)", file=sys.stderr, flush=True)

    until_told(app, host, port, ready, ssl_certfile, ssl_keyfile)
