"""Bytes from an address into a file: resumed where an earlier attempt ended, and checked when they are all there."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from hasten.errors import UserError, one_line
from hasten.files import megabytes, writing

CHUNK = 2**18
SECONDS = 20.0
"""Without a byte, before a connection counts as lost."""

Report = Callable[[int, int], None]
"""Told how many bytes are here, and how many there are."""


class Unavailable(UserError):
    """A source does not give what it was asked for; another one may."""


@dataclass(frozen=True)
class Offer:
    """Where a file can be had.

    `source` says so to the user; `size` (bytes) and `sha256` are the file's. Where `member` is given, the file is an
    archive, and the model that file in it.
    """

    source: str
    url: str
    size: int
    sha256: str
    member: str | None = None


def stream(offer: Offer, start: int) -> tuple[int, Iterator[bytes]]:
    """The file's bytes from `start` on; from 0 where its server does not resume, as the first result says.

    Raises:
        Unavailable: no answer, another than the file, or (while the bytes are read) a connection that breaks.
    """
    headers = {"User-Agent": "hasten", "Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urlopen(Request(offer.url, headers=headers), timeout=SECONDS)
    except HTTPError as error:
        raise Unavailable(f"{offer.source} answers {error.code} {error.reason}") from error
    except (OSError, ValueError, HTTPException) as error:
        raise Unavailable(f"{offer.source} cannot be reached: {one_line(error)}") from error
    return (start if response.status == 206 else 0), _chunks(response, offer.source)


def _chunks(response: Any, source: str) -> Iterator[bytes]:
    with response:
        while True:
            try:
                chunk = response.read(CHUNK)
            except (OSError, HTTPException) as error:
                raise Unavailable(f"{source} broke off: {one_line(error)}") from error
            if not chunk:
                return
            yield chunk


def transfer(offer: Offer, part: Path, report: Report) -> None:
    """Fill `part` with the file. What an earlier transfer left there is kept; one that breaks off is taken up again as
    long as it gets on.

    Raises:
        Unavailable: it cannot be had (what came stays in `part`), or something else came (nothing of it stays).
        UserError: it cannot be written, or there is no room.
    """
    while (there := size_of(part)) < offer.size:
        _require_room(offer, part)
        broken = Unavailable(f"{offer.source} ended early")
        try:
            _append(offer, part, report)
        except Unavailable as error:
            broken = error
        if size_of(part) <= there:
            raise broken
    digest = sha256_of(part)
    if digest != offer.sha256:
        part.unlink()
        raise Unavailable(
            f"{offer.source} gave another file than it should (SHA-256 {digest[:12]}, not {offer.sha256[:12]}), "
            "of which nothing was kept"
        )


def _append(offer: Offer, part: Path, report: Report) -> None:
    """Write what is still missing behind what is there."""
    there, chunks = stream(offer, size_of(part))
    with writing(part), part.open("ab" if there else "wb") as file:
        report(there, offer.size)
        for chunk in chunks:
            file.write(chunk)
            there += len(chunk)
            report(there, offer.size)
            if there > offer.size:
                # Not the file, and perhaps without an end.
                return


def _require_room(offer: Offer, part: Path) -> None:
    """Room for what is still to come, and for the model beside its archive."""
    wanted = offer.size * (1 if offer.member is None else 2) - size_of(part)
    free = shutil.disk_usage(part.parent).free
    if free < wanted:
        raise UserError(
            f"no room in {part.parent}: {megabytes(wanted)} are needed, and {megabytes(free)} are free "
            "(HASTEN_CACHE names another folder)"
        )


def size_of(file: Path) -> int:
    """Bytes; 0 where there is none."""
    return file.stat().st_size if file.exists() else 0


def sha256_of(file: Path) -> str:
    """In hexadecimal digits.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {file}: {one_line(error)}") from error
