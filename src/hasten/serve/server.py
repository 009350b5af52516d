"""Serves an application until it is told to end; what has begun is finished first."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from hasten.errors import UserError

SWITCH = 0.0005
"""Seconds after which the interpreter lets another thread run: a step that holds it must not keep the loop waiting."""


class Server(uvicorn.Server):
    """Uvicorn's, which ends with success where it was asked to end."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """On the first signal nothing new is let in, and streams go on to their end; on the second they do not."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _end(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


def serve(
    app: FastAPI,
    host: str,
    port: int,
    ready: Callable[[str], None],
    certificate: str | None = None,
    private_key: str | None = None,
) -> None:
    """Until SIGINT or SIGTERM.

    Args:
        port: 0 for any that is free.
        ready: told the address, once clients can connect.
        certificate, private_key: files of TLS.

    Raises:
        UserError: the address cannot be had, or the certificate cannot be read.
    """
    sys.setswitchinterval(SWITCH)
    try:
        config = uvicorn.Config(
            app, host, port, log_level="warning", ssl_certfile=certificate, ssl_keyfile=private_key, lifespan="on"
        )
        config.load()
    except OSError as error:
        raise UserError(f"cannot read the certificate or its key: {error}") from error
    server = Server(config)
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    address = listening.getsockname()
    scheme = "https" if config.is_ssl else "http"

    async def run() -> None:
        serving = asyncio.ensure_future(server.serve([listening]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            name = f"[{address[0]}]" if ":" in address[0] else address[0]
            ready(f"{scheme}://{name}:{address[1]}")
        await serving

    asyncio.run(run())
