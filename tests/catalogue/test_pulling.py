"""A pulled model is there whole and right, or not at all, whoever had it and whatever went wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from served import MODEL, Server, sha256

from hasten.catalogue import sources
from hasten.catalogue.entries import CATALOGUE, Entry, located, missing, named, shipped
from hasten.catalogue.pulling import pull, remove
from hasten.catalogue.transfer import Report, Unavailable
from hasten.errors import Notice, UserError

OFFLINE = OSError("no route to it")


def files(entry: Entry) -> list[str]:
    """What lies beside the model, the lock aside."""
    return sorted(name for name in os.listdir(entry.path.parent) if not name.startswith("."))


def test_the_hub_is_asked_first(entry: Entry, hub: SimpleNamespace, report: Report) -> None:
    got = pull(entry, report)
    assert (got.path, got.size, got.sha256) == (entry.path, len(MODEL), sha256(MODEL))
    assert got.source == "the hub (owner/small)"
    assert entry.path.read_bytes() == MODEL and files(entry) == ["small.gguf"]


def test_what_is_here_is_not_pulled_again(entry: Entry, hub: SimpleNamespace, server: Server, report: Report) -> None:
    first = pull(entry, report)
    hub.error = OFFLINE
    assert pull(entry, report) == replace(first, source=None)
    assert len(server.ranges) == 1


def test_a_damaged_model_is_pulled_again(entry: Entry, hub: SimpleNamespace, report: Report) -> None:
    pull(entry, report)
    entry.path.write_bytes(MODEL[:-1])
    with pytest.warns(Notice, match="damaged"):
        assert pull(entry, report).source is not None
    assert entry.path.read_bytes() == MODEL


def test_without_a_hub_the_wheel_is_taken(
    packed: tuple[Entry, Path], hub: SimpleNamespace, pip: SimpleNamespace, report: Report
) -> None:
    hub.error = OFFLINE
    entry, _ = packed
    got = pull(entry, report)
    assert got.source == "pip (fake-model==1.0)" and pip.calls == ["install"]
    assert entry.path.read_bytes() == MODEL and files(entry) == ["small.gguf"]


def test_a_wheel_that_only_pip_can_have_is_downloaded_by_pip(
    packed: tuple[Entry, Path], hub: SimpleNamespace, pip: SimpleNamespace, server: Server, report: Report
) -> None:
    """An index with a password."""
    entry, _ = packed
    hub.error, pip.url, server.status = OFFLINE, server.url, 401
    pull(entry, report)
    assert pip.calls == ["install", "download"]
    assert entry.path.read_bytes() == MODEL and files(entry) == ["small.gguf"]


def test_a_wheel_is_resumed(
    packed: tuple[Entry, Path], hub: SimpleNamespace, pip: SimpleNamespace, server: Server, report: Report
) -> None:
    entry, wheel = packed
    hub.error, pip.url, server.content = OFFLINE, server.url, wheel.read_bytes()

    def interrupt(done: int, total: int) -> None:
        if done > 2**18:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(entry, interrupt)
    assert not entry.path.exists() and len(files(entry)) == 1
    pull(entry, report)
    assert entry.path.read_bytes() == MODEL and files(entry) == ["small.gguf"]
    assert server.ranges[0] is None and server.ranges[1] is not None


def test_what_another_source_left_goes_too(
    packed: tuple[Entry, Path], hub: SimpleNamespace, pip: SimpleNamespace, server: Server, report: Report
) -> None:
    """The hub breaks off in the middle, and the wheel is taken."""
    entry, _ = packed
    server.breaks, server.resumes = 1000, False
    assert pull(entry, report).source == "pip (fake-model==1.0)"
    assert files(entry) == ["small.gguf"]


def test_a_file_that_the_catalogue_does_not_mean_is_not_asked_for(
    packed: tuple[Entry, Path], hub: SimpleNamespace, pip: SimpleNamespace, server: Server, report: Report
) -> None:
    hub.etag = sha256(b"another")
    assert pull(packed[0], report).source == "pip (fake-model==1.0)" and not server.ranges


def test_the_hubs_own_hash_is_checked_where_the_catalogue_has_none(
    entry: Entry, hub: SimpleNamespace, server: Server, report: Report
) -> None:
    entry = replace(entry, sha256=None, size=1)
    server.content = MODEL[::-1]
    with pytest.raises(UserError, match=r"cannot pull small: .*another file than it should.*; no package"):
        pull(entry, report)
    assert files(entry) == []
    server.content = MODEL
    assert pull(entry, report).sha256 == sha256(MODEL)


@pytest.mark.parametrize("states", [{"etag": None}, {"etag": "abc"}, {"size": None}])
def test_what_the_hub_does_not_state_cannot_be_checked(
    entry: Entry, hub: SimpleNamespace, report: Report, states: dict[str, None]
) -> None:
    vars(hub).update(states)
    with pytest.raises(UserError, match="the hub states no size and SHA-256"):
        pull(entry, report)


def test_no_source_is_one_sentence(
    packed: tuple[Entry, Path], hub: SimpleNamespace, pip: SimpleNamespace, report: Report
) -> None:
    hub.error, pip.error = OSError("no\nroute"), "pip: No matching distribution found for fake-model==1.0"
    with pytest.raises(UserError) as refused:
        pull(packed[0], report)
    assert str(refused.value) == (
        "cannot pull small: the hub does not give owner/small: no route; "
        "pip: No matching distribution found for fake-model==1.0"
    )
    assert files(packed[0]) == []


def test_another_wheel_is_refused(
    packed: tuple[Entry, Path], hub: SimpleNamespace, pip: SimpleNamespace, report: Report
) -> None:
    entry, wheel = packed
    hub.error = OFFLINE
    wheel.write_bytes(wheel.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="another file than it should"):
        pull(entry, report)
    assert files(entry) == []


def test_another_model_in_the_wheel_is_refused(
    packed: tuple[Entry, Path], hub: SimpleNamespace, pip: SimpleNamespace, report: Report
) -> None:
    hub.error = OFFLINE
    entry = replace(packed[0], sha256=sha256(b"another"))
    with pytest.raises(UserError, match="holds another file"):
        pull(entry, report)
    assert not entry.path.exists()


@pytest.mark.parametrize("answer", ["no JSON", "[]", '{"install": []}', '{"install": [{"download_info": 1}]}'])
def test_what_pip_says_is_not_trusted(
    packed: tuple[Entry, Path], pip: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr(sources, "pip", lambda *arguments: answer)
    with pytest.raises(Unavailable, match="pip does not say where"), sources.from_index(packed[0]):
        pass


@pytest.mark.parametrize(
    ("errors", "sentence"),
    [
        ("WARNING: one\nERROR: two\nERROR: No matching distribution\n", "pip: No matching distribution"),
        ("/usr/bin/python3: No module named pip\n", "pip: /usr/bin/python3: No module named pip"),
        ("", "pip: exit status 1"),
    ],
)
def test_why_pip_fails_is_told(monkeypatch: pytest.MonkeyPatch, errors: str, sentence: str) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1, stderr=errors, stdout=""))
    with pytest.raises(Unavailable) as refused:
        sources.pip("download")
    assert str(refused.value) == sentence


def test_a_folder_that_cannot_be_is_one_sentence(
    entry: Entry, hub: SimpleNamespace, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write .*small.gguf: Not a directory"):
        pull(entry, report)


def test_two_at_once_pull_once(entry: Entry, hub: SimpleNamespace, server: Server) -> None:
    """The second waits, and finds the model."""
    began, go = threading.Event(), threading.Event()

    def slowly(done: int, total: int) -> None:
        began.set()
        assert go.wait(30)

    got = []
    first = threading.Thread(target=lambda: got.append(pull(entry, slowly)))
    first.start()
    assert began.wait(30)
    second = threading.Thread(target=lambda: got.append(pull(entry, lambda done, total: None)))
    with pytest.warns(Notice, match="another process is pulling small: waiting for it"):
        second.start()
        time.sleep(0.2)
        go.set()
        first.join()
        second.join()
    assert [each.source for each in got] == ["the hub (owner/small)", None] and len(server.ranges) == 1
    assert entry.path.read_bytes() == MODEL


def test_a_model_is_removed_with_what_is_left_of_it(entry: Entry, hub: SimpleNamespace, report: Report) -> None:
    with pytest.raises(UserError, match="small is not here"):
        remove(entry)
    pull(entry, report)
    entry.path.with_name("small.gguf.0123.part").touch()
    remove(entry)
    assert files(entry) == []


def test_the_catalogue() -> None:
    """Names are no paths and none of the shipped ones; what has no hash of its own has no wheel either."""
    assert not set(CATALOGUE) & set(shipped())
    for name, entry in CATALOGUE.items():
        assert entry.name == name and "/" not in name and entry.repository.count("/") == 1
        assert entry.file.endswith(".gguf") and entry.size > 10**7 and entry.licence
        assert entry.wheel is None or (entry.sha256 and entry.wheel.sha256)
        assert entry.sha256 is None or len(entry.sha256) == 64


def test_names(entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(CATALOGUE, "small", entry)
    assert named("small") is entry is missing("small")
    assert located("none") is None is missing("none")
    with pytest.raises(UserError, match="no model 'none' to pull; there are smollm2, "):
        named("none")
    with pytest.raises(UserError, match="tiny ships with hasten"):
        named("tiny")
    (tmp_path / "small").mkdir()
    assert missing("small") is None
    (tmp_path / "small").rmdir()
    entry.path.parent.mkdir()
    entry.path.touch()
    assert missing("small") is None and located("small") == entry.path


def test_pip_is_asked_as_pip_wants_it() -> None:
    """The real one, without an index: options that it does not know would be another error."""
    command = [sys.executable, "-P", "-m", "pip", "--version"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this environment has no pip")
    for arguments in (["install", "--dry-run", "--ignore-installed", "--report", "-"], ["download", "--dest", "."]):
        with pytest.raises(Unavailable, match=r"pip: No matching distribution found for fake-model==1.0"):
            sources.pip(*arguments, "--no-index", "fake-model==1.0")
