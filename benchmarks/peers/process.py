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
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from catalogue import Peer
from environments import HERE, Unavailable, interpreter
from limits import limit, send, start
from workers.protocol import Answer, Settings


class Process:
    """A loaded peer. It sleeps (SIGSTOP, with all its threads and children) whenever it is not `awake`.

    Args:
        peer: which.
        settings: what it loads.
        log: what it and its libraries print goes there.
        timeout: seconds that loading, and each answer, may take.
        python: that runs it; by default the peer's own.

    Raises:
        Unavailable: loading fails.
    """

    def __init__(self, peer: Peer, settings: Settings, log: Path, timeout: float, python: Path | None = None) -> None:
        self._timeout = timeout
        processors = sorted(os.sched_getaffinity(0))[: settings.threads]
        threads = {name: str(settings.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        with log.open("a") as errors:
            self._process = start(
                [str(python or interpreter(peer)), "-m", "workers", peer.worker, "serve", json.dumps(asdict(settings))],
                cwd=HERE,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | threads,
                preexec_fn=lambda: os.sched_setaffinity(0, processors),
            )
        try:
            self._hear()
        except BaseException:
            self.close()
            raise
        send(self._process, signal.SIGSTOP)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """While it may compute."""
        send(self._process, signal.SIGCONT)
        try:
            yield
        finally:
            send(self._process, signal.SIGSTOP)

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

    def logits(self, prompt: list[int]) -> torch.Tensor | None:
        """See `Worker.logits`; a file carries them, as they are large."""
        with TemporaryDirectory() as folder:
            file = Path(folder) / "logits.npy"
            if not self._ask({"do": "logits", "prompt": prompt, "file": str(file)})["told"]:
                return None
            array = np.load(file)
        if len(array) != len(prompt):
            raise Unavailable(f"gave {len(array)} predictions for {len(prompt)} tokens")
        return torch.from_numpy(array)

    @property
    def ended(self) -> bool:
        """Whether the process is no more."""
        return self._process.poll() is not None

    def close(self) -> None:
        """End it, whatever it does."""
        send(self._process, signal.SIGKILL)
        self._process.communicate()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            # It is no more; hearing nothing says so.
            pass
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout
        with limit(self._process, self._timeout) as passed:
            line = self._process.stdout.readline()
        # Without its end, a line is what a dying process had begun to say.
        if not line.endswith("\n"):
            self.close()
            late, status = f"no answer within {self._timeout:g} s", self._process.returncode
            raise Unavailable(late if passed.is_set() else f"its process ended with status {status}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Unavailable(answer["error"])
        return answer
