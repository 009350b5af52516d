"""A worker process: pinned, asked by lines of JSON, and stopped while others are measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from catalogue import Peer
from environments import HERE, Unavailable, interpreter
from workers.protocol import Answer, Settings


class Process:
    """A loaded peer. It sleeps (SIGSTOP, with all its threads and children) whenever it is not `awake`.

    Args:
        peer: which.
        settings: what it loads.
        log: what it and its libraries print goes there.

    Raises:
        Unavailable: loading fails.
    """

    def __init__(self, peer: Peer, settings: Settings, log: Path, python: Path | None = None) -> None:
        processors = sorted(os.sched_getaffinity(0))[: settings.threads]
        threads = {name: str(settings.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [str(python or interpreter(peer)), "-m", "workers", peer.worker, "serve", json.dumps(asdict(settings))],
                cwd=HERE,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | threads,
                start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, processors),
            )
        try:
            self._hear()
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """While it may compute."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def begin(self, speculation: str | None) -> None:
        """See `Worker.begin`."""
        self._ask({"do": "begin", "speculation": speculation})

    def run(self, prompts: list[list[int]], max_tokens: int, speculation: str | None) -> Answer:
        """See `Worker.run`."""
        request = {"do": "run", "prompts": prompts, "max_tokens": max_tokens, "speculation": speculation}
        answer = Answer(**self._ask(request))
        short = [len(tokens) for tokens in answer.tokens if len(tokens) != max_tokens]
        if short:
            raise Unavailable(f"gave {short[0]} tokens where {max_tokens} were asked for")
        return answer

    @property
    def ended(self) -> bool:
        """Whether the process is no more."""
        return self._process.poll() is not None

    def close(self) -> None:
        """End it, whatever it does."""
        self._signal(signal.SIGKILL)
        self._process.communicate()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Unavailable("its process ended") from None
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise Unavailable(f"its process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Unavailable(answer["error"])
        return answer

    def _signal(self, number: int) -> None:
        """To the process and its children, if they still are."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)
