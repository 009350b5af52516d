"""Bytes from an address: resumed, taken up again, checked, or refused in one sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from served import MODEL, Server, sha256

from hasten.catalogue import transfer as transferring
from hasten.catalogue.transfer import Offer, Report, Unavailable, transfer
from hasten.errors import UserError


@pytest.fixture
def offer(server: Server) -> Offer:
    return Offer("the server", server.url, len(MODEL), sha256(MODEL))


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / "model.part"


def test_a_file_arrives(server: Server, offer: Offer, part: Path, seen: list[tuple[int, int]], report: Report) -> None:
    transfer(offer, part, report)
    assert part.read_bytes() == MODEL and server.ranges == [None]
    assert seen[0] == (0, len(MODEL)) and seen[-1] == (len(MODEL), len(MODEL)) and seen == sorted(seen)


def test_what_is_here_is_not_asked_for_again(
    server: Server, offer: Offer, part: Path, seen: list[tuple[int, int]], report: Report
) -> None:
    part.write_bytes(MODEL[:1000])
    transfer(offer, part, report)
    assert part.read_bytes() == MODEL and server.ranges == ["bytes=1000-"] and seen[0] == (1000, len(MODEL))
    transfer(offer, part, report)
    assert len(server.ranges) == 1


def test_a_server_that_does_not_resume_sends_all(server: Server, offer: Offer, part: Path, report: Report) -> None:
    server.resumes = False
    part.write_bytes(MODEL[:1000])
    transfer(offer, part, report)
    assert part.read_bytes() == MODEL


def test_a_connection_that_breaks_is_taken_up_while_it_gets_on(
    server: Server, offer: Offer, part: Path, report: Report
) -> None:
    server.breaks = 2**18 + 5
    transfer(offer, part, report)
    assert part.read_bytes() == MODEL
    assert server.ranges == [None, *(f"bytes={server.breaks * count}-" for count in (1, 2, 3))]


@pytest.mark.parametrize("resumes", [True, False])
def test_one_that_gets_nowhere_is_given_up_and_what_came_stays(
    server: Server, offer: Offer, part: Path, report: Report, resumes: bool
) -> None:
    part.write_bytes(MODEL[:1000])
    server.breaks, server.resumes = (0, True) if resumes else (1000, False)
    with pytest.raises(Unavailable, match=r"the server ended early|the server broke off"):
        transfer(offer, part, report)
    assert part.read_bytes() == MODEL[:1000]


@pytest.mark.parametrize("status", [401, 404, 416, 503])
def test_another_answer_is_told(server: Server, offer: Offer, part: Path, report: Report, status: int) -> None:
    server.status = status
    with pytest.raises(Unavailable, match=f"^the server answers {status} [A-Za-z ]+$"):
        transfer(offer, part, report)
    assert not part.exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/", "file:///no/such/file", "nonsense", "http://no\nurl"])
def test_what_cannot_be_reached_is_told(offer: Offer, part: Path, report: Report, url: str) -> None:
    with pytest.raises(Unavailable, match="the server cannot be reached: "):
        transfer(replace(offer, url=url), part, report)


@pytest.mark.parametrize("content", [MODEL[:-1] + b"?", MODEL + b"?", MODEL + bytes(2**22)], ids=len)
def test_another_file_is_refused_and_nothing_of_it_stays(
    server: Server, offer: Offer, part: Path, report: Report, content: bytes
) -> None:
    server.content = content
    with pytest.raises(Unavailable, match="another file than it should"):
        transfer(offer, part, report)
    assert not part.exists()


def test_a_damaged_beginning_is_found_out(server: Server, offer: Offer, part: Path, report: Report) -> None:
    part.write_bytes(b"?" * 1000)
    with pytest.raises(Unavailable, match="another file than it should"):
        transfer(offer, part, report)
    transfer(offer, part, report)
    assert part.read_bytes() == MODEL


def test_no_room_is_told_before_anything_is_asked(
    server: Server, offer: Offer, part: Path, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transferring.shutil, "disk_usage", lambda folder: SimpleNamespace(free=300_000))
    with pytest.raises(UserError, match=r"no room in .*: 1 MB are needed, and 0 MB are free") as refused:
        transfer(offer, part, report)
    assert not isinstance(refused.value, Unavailable) and not server.ranges
    # Of what is needed, much may be here.
    part.write_bytes(MODEL[:-1000])
    transfer(offer, part, report)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_full_disk_is_one_sentence(offer: Offer, part: Path, report: Report) -> None:
    """No other source would help."""
    part.symlink_to("/dev/full")
    with pytest.raises(UserError, match=f"cannot write {part}: {os.strerror(28)}") as refused:
        transfer(offer, part, report)
    assert not isinstance(refused.value, Unavailable)


def test_an_interruption_leaves_what_came(server: Server, offer: Offer, part: Path, report: Report) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > 2**18:
            raise KeyboardInterrupt

    stopped: Callable[[int, int], None] = interrupt
    with pytest.raises(KeyboardInterrupt):
        transfer(offer, part, stopped)
    kept = part.stat().st_size
    assert 0 < kept < len(MODEL)
    transfer(offer, part, report)
    assert part.read_bytes() == MODEL and server.ranges == [None, f"bytes={kept}-"]
