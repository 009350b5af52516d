"""A virtual environment per peer, made once, and converted checkpoints, made once per content and precision."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from catalogue import Peer
from limits import output

from hasten.errors import UserError
from hasten.files import cache_folder

HERE = Path(__file__).parent
MARKER = "made.json"
# From HERE, where pip runs: in these variables a space ends a name.
CONSTRAINTS = dict.fromkeys(("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"), "requirements/constraints.txt")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


class Unavailable(Exception):
    """A peer that cannot be measured, and why, in one line."""


def base() -> Path:
    """Where environments and converted checkpoints are kept: `$HASTEN_CACHE/peers`, by default in the user's cache."""
    folder: Path = cache_folder("peers")
    return folder.absolute()


def interpreter(peer: Peer) -> Path:
    """The Python that runs a peer."""
    return base() / peer.folder / "venv" / "bin" / "python" if peer.installs else Path(sys.executable)


def installed(peer: Peer) -> bool:
    """Whether the environment stands, made with what the catalogue says today."""
    if not peer.installs:
        return True
    marker = base() / peer.folder / MARKER
    return marker.exists() and marker.read_text() == _recipe(peer)


def _recipe(peer: Peer) -> str:
    files = [HERE / call[1] for call in peer.installs if call[0] == "-r"]
    return json.dumps([peer.installs, [file.read_text() for file in files]])


def install(peer: Peer, say: Callable[[str], None]) -> None:
    """Make a peer's environment unless it stands. What an interrupted run left is made anew.

    Raises:
        Unavailable: an installation fails; the log beside the environment says more.
    """
    if installed(peer):
        return
    folder = base() / peer.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "install.log"
    say(f"{peer.name}: installing (once; {log})")
    pip = [str(interpreter(peer)), "-m", "pip"]
    commands = [[sys.executable, "-m", "venv", str(folder / "venv")], [*pip, "install", "--upgrade", "pip"]]
    commands += [[*pip, "install", *call] for call in peer.installs]
    variables = os.environ | CONSTRAINTS | dict(peer.environment)
    with log.open("w") as printed:
        for command in commands:
            done = subprocess.run(command, cwd=HERE, stdout=printed, stderr=subprocess.STDOUT, env=variables)
            if done.returncode:
                stopped = f"signal {-done.returncode} ended it" if done.returncode < 0 else _reason(log)
                raise Unavailable(f"installation failed: {stopped}")
    (folder / MARKER).write_text(_recipe(peer))


def _reason(log: Path) -> str:
    """The last line of a log that speaks of an error, or else the last one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no output")[
        :200
    ]


def version(peer: Peer) -> str | None:
    """Of the peer's package, if it is installed."""
    if not installed(peer):
        return None
    code = f"from importlib.metadata import version; print(version({peer.package!r}))"
    done = subprocess.run([str(interpreter(peer)), "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or None


def digest(checkpoint: Path) -> str:
    """A checkpoint's content in twenty digits: configuration, tokenizer and weights.

    Raises:
        UserError: no weights there.
    """
    if checkpoint.is_file():
        with checkpoint.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:20]
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{checkpoint} has no safetensors weights")
    total = hashlib.sha256()
    for file in [checkpoint / "config.json", *(checkpoint / name for name in TOKENIZER), *weights]:
        if file.exists():
            with file.open("rb") as stream:
                total.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:20]


def converted(
    peer: Peer, checkpoint: Path, precision: str, log: Path, timeout: float, say: Callable[[str], None]
) -> Path:
    """The checkpoint as the peer reads it, converted now or earlier; a GGUF file is read as it is.

    Raises:
        Unavailable: the peer's converter fails, or takes longer than `timeout` seconds.
    """
    if not peer.converts or checkpoint.is_file():
        return checkpoint
    target = base() / "converted" / digest(checkpoint) / f"{peer.name}-{precision}"
    if target.exists():
        return target
    say(f"{peer.name}: converting to {precision} (once)")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch, log.open("a") as errors:
        made = Path(scratch) / "made"
        made.mkdir()
        command = [str(interpreter(peer)), "-m", "workers", peer.worker, "convert", str(checkpoint), str(made)]
        try:
            answer = json.loads(output([*command, precision], timeout, cwd=HERE, stderr=errors))
        except TimeoutError as error:
            raise Unavailable(f"conversion {error}") from None
        except ValueError:
            answer = {"error": "the converter ended without a word"}
        if "error" in answer:
            raise Unavailable(f"conversion failed: {answer['error']} ({log})")
        made.rename(target)
    return target
