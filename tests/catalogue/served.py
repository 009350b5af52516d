"""A small model, and a server on this machine that behaves as it is told."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

MODEL = os.urandom(3 * 2**18 + 17)
MEMBER = "fake_model/model.gguf"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Server:
    """Answers with its content, whatever path is asked for.

    Attributes:
        resumes: whether ranges are served.
        breaks: each answer ends behind so many bytes, if that is before the end.
        status: another answer than the content.
        ranges: the range that each request asked for.
    """

    content: bytes = MODEL
    resumes: bool = True
    breaks: int = 2**30
    status: int | None = None
    ranges: list[str | None] = field(default_factory=list)
    url: str = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        if self.status is not None:
            request.send_error(self.status)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.resumes else 0
        rest = self.content[start:]
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(rest)))
        request.end_headers()
        request.wfile.write(rest[: self.breaks])
