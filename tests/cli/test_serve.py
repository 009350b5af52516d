"""`hasten serve` as a process."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from hasten.cli.app import app


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_streams_end_and_then_the_server(number: int) -> None:
    command = [sys.executable, "-m", "hasten", "serve", "--port", "0", "--threads", "1", "--method", "plain", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        text = ""
        for line in process.stdout:
            text += line
            if line.startswith("}"):
                break
        ready: dict[str, Any] = json.loads(text)
        assert ready["model"] == "tiny" and ready["pid"] == process.pid
        body = {"prompt": "Count: 1", "max_tokens": 300, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", ready["address"] + "/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(number)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(30) == 0
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--port", "99999"], "port"),
        (["--queue", "0"], "queue"),
        (["--api-key", ""], "api-key"),
        (["--method", "nothing"], "nothing"),
        (["--body-bytes", "much"], "body"),
        (["--host", "999.1.1.1", "--port", "0"], "999.1.1.1"),
        (["--ssl-certfile", "nothing.pem", "--port", "0"], "certificate"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(options: list[str], named: str) -> None:
    found = CliRunner().invoke(app, ["serve", *options])
    assert found.exit_code != 0 and named in str(found.exception)


def test_an_address_that_is_taken_is_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = CliRunner().invoke(app, ["serve", "--method", "plain", "--port", str(port)])
    assert f"127.0.0.1:{port}" in str(found.exception)
    assert capfd.readouterr().err == ""
